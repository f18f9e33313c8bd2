"""Small parts of the world."""

from __future__ import annotations

import asyncio
from typing import Any

from gpud.hypervisor import connection
from gpud.inventory import bus
from gpud.lifecycle import guests, worker
from gpud.model import LEGAL_STATUS, Status
from tests.chaos.edges import Killed
from tests.unit.fakes.libvirt_daemon import Guest

SHORT_PAUSES = (
    (connection, "FIRST_PAUSE_S", 0.0005),
    (connection, "LONGEST_PAUSE_S", 0.0005),
    (worker, "_FIRST_RETRY_S", 0.0005),
    (worker, "_LAST_RETRY_S", 0.0005),
    (guests, "_PAUSE_S", 0.0005),
    (guests, "_PAUSE_AFTER_REPORT_S", 0.0005),
    (guests, "_BOOT_EVERY_S", 0),  # on a clock that stands still
    (bus, "_FRESH_S", -1),
)


def report_again(guest: Guest) -> None:
    """Guests say again and again that the script was started; one from a silent time boots first."""
    if guest._started:
        guest.reports(guest._started)
    else:
        guest.boots()


def tell_unless_killed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle what a loop has to say of tasks: a killed process' say nothing."""
    if not isinstance(context.get("exception"), Killed):
        loop.default_exception_handler(context)


def follows(before: Status, after: Status) -> bool:
    """Whether a status may come after another, if not at once."""
    seen, reachable = {before}, [before]
    while reachable:
        for status in LEGAL_STATUS[reachable.pop()] - seen:
            seen.add(status)
            reachable.append(status)
    return after in seen
