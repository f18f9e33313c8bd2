from __future__ import annotations

import libvirt
import pytest
from structlog.testing import capture_logs

from gpud.hypervisor import events
from gpud.hypervisor.events import DomainEvent, name_event, start_event_loop, turn_once


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        (
            (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN),
            (DomainEvent.STOPPED, "shutdown"),
        ),
        (
            (libvirt.VIR_DOMAIN_EVENT_CRASHED, libvirt.VIR_DOMAIN_EVENT_CRASHED_PANICKED),
            (DomainEvent.CRASHED, "panicked"),
        ),
        ((libvirt.VIR_DOMAIN_EVENT_STARTED, 7), (DomainEvent.STARTED, "7")),
        ((libvirt.VIR_DOMAIN_EVENT_STOPPED, 99), (DomainEvent.STOPPED, "99")),
        ((99, 1), (DomainEvent.UNKNOWN, "1")),
    ],
)
def test_event_is_put_into_words(numbers: tuple[int, int], named: tuple[DomainEvent, str]) -> None:
    assert name_event(*numbers) == named


def test_event_loop_is_started_once_and_does_not_hold_up_the_process() -> None:
    assert start_event_loop() is start_event_loop()
    assert start_event_loop().daemon


def test_failing_turn_does_not_end_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise libvirt.libvirtError("poll failed")

    monkeypatch.setattr(libvirt, "virEventRunDefaultImpl", fail)
    monkeypatch.setattr(events, "_PAUSE_AFTER_FAULT_S", 0)
    with capture_logs() as logs:
        turn_once()
    assert [entry["event"] for entry in logs] == ["libvirt event loop failed, going on"]


def test_libvirt_prints_nothing_by_itself(
    capfd: pytest.CaptureFixture[str], plain_connection: libvirt.virConnect
) -> None:
    start_event_loop()
    with pytest.raises(libvirt.libvirtError):
        plain_connection.lookupByName("nobody")
    assert capfd.readouterr() == ("", "")
