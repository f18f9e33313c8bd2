"""libvirt's event loop, and the lifecycle events that it brings."""

from __future__ import annotations

import functools
import threading
import time
from enum import StrEnum
from typing import Final

import libvirt
import structlog

log = structlog.get_logger()


class DomainEvent(StrEnum):
    """What happened to a domain (libvirt's ``virDomainEventType``)."""

    DEFINED = "defined"
    UNDEFINED = "undefined"
    STARTED = "started"
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    STOPPED = "stopped"
    SHUTDOWN = "shutdown"
    PM_SUSPENDED = "pm_suspended"
    CRASHED = "crashed"
    UNKNOWN = "unknown"


_EVENTS: Final = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: DomainEvent.DEFINED,
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: DomainEvent.UNDEFINED,
    libvirt.VIR_DOMAIN_EVENT_STARTED: DomainEvent.STARTED,
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: DomainEvent.SUSPENDED,
    libvirt.VIR_DOMAIN_EVENT_RESUMED: DomainEvent.RESUMED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED: DomainEvent.STOPPED,
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: DomainEvent.SHUTDOWN,
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: DomainEvent.PM_SUSPENDED,
    libvirt.VIR_DOMAIN_EVENT_CRASHED: DomainEvent.CRASHED,
}

_DETAILS: Final = {
    DomainEvent.STOPPED: {
        libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: "shutdown",
        libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: "destroyed",
        libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: "crashed",
        libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: "failed",
    },
    DomainEvent.SHUTDOWN: {
        libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_FINISHED: "finished",
        libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_GUEST: "guest",
        libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_HOST: "host",
    },
    DomainEvent.CRASHED: {libvirt.VIR_DOMAIN_EVENT_CRASHED_PANICKED: "panicked"},
    DomainEvent.SUSPENDED: {libvirt.VIR_DOMAIN_EVENT_SUSPENDED_IOERROR: "ioerror"},
}

_PAUSE_AFTER_FAULT_S = 1.0


def name_event(event: int, detail: int) -> tuple[DomainEvent, str]:
    """Put a lifecycle event's two numbers into words; a detail that we have none for stays a number."""
    named = _EVENTS.get(event, DomainEvent.UNKNOWN)
    return named, _DETAILS.get(named, {}).get(detail, str(detail))


@functools.cache
def start_event_loop() -> threading.Thread:
    """Start libvirt's own event loop in a thread; once per process, before any connection is opened.

    Its default implementation rather than ``libvirtaio``: that one belongs to a single asyncio loop,
    for the rest of the process. A callback runs on this thread and must never wait for anything.
    """
    libvirt.registerErrorHandler(_say_nothing, None)
    libvirt.virEventRegisterDefaultImpl()
    thread = threading.Thread(target=_turn_for_ever, name="libvirt-events", daemon=True)
    thread.start()
    return thread


def _turn_for_ever() -> None:
    while True:
        turn_once()


def turn_once() -> None:
    """Wait for something to happen on any connection, and handle it."""
    try:
        libvirt.virEventRunDefaultImpl()
    except libvirt.libvirtError:
        log.exception("libvirt event loop failed, going on")
        time.sleep(_PAUSE_AFTER_FAULT_S)


def _say_nothing(_context: None, _error: object) -> None:
    """Keep libvirt from printing to stderr what it also raises."""
