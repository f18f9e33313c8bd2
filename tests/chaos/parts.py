"""Small parts of the world."""

from __future__ import annotations

import asyncio
from typing import Any

from gpud.model import LEGAL_STATUS, Status
from tests.chaos.edges import Killed
from tests.unit.fakes.libvirt_daemon import Guest


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
