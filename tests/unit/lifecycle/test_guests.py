"""The watch over guests, on a libvirtd in memory whose guests say what a test makes them say."""

# ruff: noqa: ARG001 - fixtures that only have to be there

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import libvirt
import pytest
import structlog.testing

from gpud.hypervisor.domainxml import CHANNEL_NAME
from gpud.hypervisor.stream import CHUNK_BYTES, UNREAD_LIMIT_BYTES
from gpud.lifecycle import guests as guests_module
from gpud.lifecycle.outcome import Nap
from gpud.model import Instance, Step
from tests.unit.fakes.libvirt_daemon import Guest, LibvirtDaemon, error
from tests.unit.fakes.orders import Clock, until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import CREATE_STEPS, Gpud


@pytest.fixture
async def gpud(start_gpud: StartGpud) -> Gpud:
    """A gpud whose worker drives nothing."""
    gpud = await start_gpud()
    await gpud.worker.close()
    return gpud


@pytest.fixture
async def instance(gpud: Gpud, libvirtd: LibvirtDaemon) -> Instance:
    """An instance whose guest runs and has said nothing yet."""
    libvirtd.on_start = lambda _guest: None
    instance = await gpud.order()
    for step in CREATE_STEPS[:-1]:
        await gpud.steps.functions()[step](instance)
    return instance


@pytest.fixture
def guest(instance: Instance, libvirtd: LibvirtDaemon) -> Guest:
    return libvirtd.guests[instance.domain_uuid]


Watched = Callable[[], Instance]


@pytest.fixture
async def watched(gpud: Gpud, instance: Instance, guest: Guest) -> Watched:
    """Attach, and give the instance's record as it is."""
    gpud.guests.attach(instance)
    await until(lambda: guest.channels[CHANNEL_NAME].stream and guest.console.stream)
    return lambda: gpud.store.live[instance.upstream_id]


def started(boot_id: object = None) -> bytes:
    return f"gpud1 started {boot_id or uuid4()}\n".encode()


async def everything_read(gpud: Gpud, guest: Guest) -> None:
    """Send a last line through both streams, and wait until it has come through."""
    boot_id = str(uuid4()).encode()
    guest.prints(boot_id)
    guest.reports(started(boot_id.decode()))
    upstream_id = next(iter(gpud.store.live))
    await until(lambda: boot_id in gpud.consoles.read(upstream_id))
    await until(lambda: gpud.store.live[upstream_id].boot_id == boot_id.decode())


# -- reports ---------------------------------------------------------------------------------------


async def test_a_report_of_the_script_started_is_counted(watched: Watched, guest: Guest) -> None:
    guest.boots()
    await until(lambda: watched().guest_boots == 1)


async def test_a_report_from_before_anyone_listened_is_not_lost(
    gpud: Gpud, instance: Instance, guest: Guest
) -> None:
    guest.boots()
    gpud.guests.attach(instance)
    await until(lambda: gpud.store.live[instance.upstream_id].guest_boots == 1)


async def test_one_boot_counts_once_and_each_further_boot_too(
    gpud: Gpud, watched: Watched, guest: Guest
) -> None:
    boot_id = uuid4()
    guest.reports(started(boot_id) * 3)
    guest.reports(started(boot_id))
    await everything_read(gpud, guest)
    assert watched().guest_boots == 2  # that boot, and the mark


async def test_made_up_boots_count_once_a_minute(
    gpud: Gpud, watched: Watched, guest: Guest, monotonic: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests_module, "_BOOT_EVERY_S", 60)
    for _ in range(50):
        guest.boots()
    last = uuid4()
    guest.reports(started(last))
    guest.prints(b"end")
    await until(lambda: b"end" in gpud.consoles.read(next(iter(gpud.store.live))))
    await asyncio.sleep(0.02)
    assert watched().guest_boots == 1
    monotonic.advance(61)
    guest.reports(started(last))
    await until(lambda: watched().boot_id == str(last))
    assert watched().guest_boots == 2


@pytest.mark.parametrize(("exit_code", "result"), [(0, "ok"), (1, "failed"), (255, "failed")])
async def test_an_exit_code_is_recorded_and_counted(
    gpud: Gpud, watched: Watched, guest: Guest, exit_code: int, result: str
) -> None:
    boot_id = guest.boots()
    guest.reports(f"gpud1 exited {boot_id} {exit_code}\r\n".encode())
    await until(lambda: watched().script_exit_code == exit_code)
    name = "gpud_startup_script_exits_total"
    await until(lambda: gpud.metrics.registry.get_sample_value(name, {"result": result}) == 1)


async def test_a_repeated_exit_code_counts_once(gpud: Gpud, watched: Watched, guest: Guest) -> None:
    line = f"gpud1 exited {guest.boots()} 3\n".encode()
    guest.reports(line * 3)
    await everything_read(gpud, guest)
    name = "gpud_startup_script_exits_total"
    assert gpud.metrics.registry.get_sample_value(name, {"result": "failed"}) == 1


async def test_a_report_in_pieces_is_put_together(watched: Watched, guest: Guest) -> None:
    line = started()
    for index in range(0, len(line), 7):
        guest.reports(line[index : index + 7])
        await asyncio.sleep(0.001)
    await until(lambda: watched().guest_boots == 1)


NONSENSE = [
    b"\n" * 1000,
    bytes(range(256)) * 20,
    b"gpud1 started\n",
    b"gpud1 started not-a-boot-id\n",
    b"gpud1 started " + b"0" * 37 + b"\n",
    b"gpud2 started 00000000-0000-0000-0000-000000000000\n",
    b" gpud1 started 00000000-0000-0000-0000-000000000000\n",
    b"x" * 300 + b"gpud1 started 00000000-0000-0000-0000-000000000000\n",
    b"gpud1 started 00000000-0000-0000-0000-000000000000 trailing\n",
    b"gpud1 started 00000000-0000-0000-0000-000000000000" + b" " * 300 + b"\n",
    b"gpud1 exited 00000000-0000-0000-0000-000000000000\n",
    b"gpud1 exited 00000000-0000-0000-0000-000000000000 -1\n",
    b"gpud1 exited 00000000-0000-0000-0000-000000000000 1000\n",
    "gpud1 exited 00000000-0000-0000-0000-000000000000 ٣\n".encode(),
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=range(len(NONSENSE)))
async def test_what_is_no_report_changes_nothing_and_the_next_report_counts(
    gpud: Gpud, watched: Watched, guest: Guest, nonsense: bytes
) -> None:
    guest.reports(nonsense)
    guest.reports(b"\n")
    await everything_read(gpud, guest)
    assert watched().guest_boots == 1
    assert watched().script_exit_code is None


async def test_an_endless_line_is_not_kept_in_memory(
    gpud: Gpud, watched: Watched, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Watching:
        def finditer(self, lines: bytes) -> Any:
            sizes.append(len(lines))
            return pattern.finditer(lines)

    pattern = guests_module._REPORT
    monkeypatch.setattr(guests_module, "_REPORT", Watching())
    for _ in range(40):
        guest.reports(b"A" * CHUNK_BYTES)
        await asyncio.sleep(0)
    guest.reports(b"\n")
    await everything_read(gpud, guest)
    assert watched().guest_boots == 1
    assert max(sizes) <= CHUNK_BYTES + guests_module._MAX_LINE_BYTES


async def test_a_flood_is_read_at_a_pace_and_its_excess_is_dropped(
    watched: Watched, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests_module, "_PAUSE_AFTER_REPORT_S", 1000)
    lines = 4 * UNREAD_LIMIT_BYTES // len(started())
    guest.reports(b"".join(started() for _ in range(lines // 40)) * 40)
    await until(lambda: watched().guest_boots)
    await asyncio.sleep(0.02)
    assert watched().guest_boots == 1


async def test_a_guests_word_counts_for_itself_alone(
    gpud: Gpud, watched: Watched, guest: Guest
) -> None:
    other = await gpud.order("order-2")
    guest.reports(f"gpud1 started {other.domain_uuid}\n".encode())
    guest.reports(f"{other.upstream_id}\n".encode())
    await everything_read(gpud, guest)
    assert gpud.store.live[other.upstream_id].guest_boots == 0


async def test_a_report_that_cannot_be_recorded_counts_when_it_is_repeated(
    gpud: Gpud,
    instance: Instance,
    watched: Watched,
    guest: Guest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def full(*_: str) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as broken, structlog.testing.capture_logs() as logs:
        broken.setattr(gpud.store, "guest_booted", full)
        boot_id = guest.boots()
        await until(lambda: logs)
    assert [log["event"] for log in logs] == ["guest reader failed"]
    gpud.guests.attach(instance)
    guest.reports(started(boot_id))
    await until(lambda: watched().guest_boots == 1)


# -- streams ---------------------------------------------------------------------------------------


async def test_attaching_twice_makes_one_reader_of_each_kind(
    gpud: Gpud, instance: Instance, watched: Watched, guest: Guest
) -> None:
    gpud.guests.attach(instance)
    await everything_read(gpud, guest)
    assert (guest.console.opened, guest.channels[CHANNEL_NAME].opened) == (1, 1)


async def test_streams_that_ended_are_opened_again_by_the_next_attach(
    gpud: Gpud, instance: Instance, watched: Watched, guest: Guest
) -> None:
    guest.hang_up()
    await until(lambda: all(task.done() for task in gpud.guests._tasks.values()))
    guest.prints(b"meanwhile ")
    gpud.guests.attach(instance)
    await until(lambda: guest.console.stream and guest.channels[CHANNEL_NAME].stream)
    await everything_read(gpud, guest)
    assert gpud.consoles.read(instance.upstream_id).startswith(b"meanwhile ")
    assert watched().guest_boots == 1


async def test_libvirtd_restarted_under_the_readers_is_read_again(
    gpud: Gpud, instance: Instance, watched: Watched, guest: Guest, libvirtd: LibvirtDaemon
) -> None:
    libvirtd.stop()
    await until(lambda: all(task.done() for task in gpud.guests._tasks.values()))
    await until(lambda: not gpud.hypervisor.available)
    libvirtd.start()
    await gpud.hypervisor.wait_available()
    guest.boots()
    gpud.guests.attach(instance)
    await until(lambda: watched().guest_boots == 1)


@pytest.mark.parametrize("call", ["openConsole", "openChannel"])
async def test_a_stream_that_cannot_be_opened_leaves_the_other_be(
    gpud: Gpud, instance: Instance, guest: Guest, libvirtd: LibvirtDaemon, call: str
) -> None:
    libvirtd.fault(call, error("no such device"), times=2)
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            gpud.guests.attach(instance)
            await until(lambda: sum(task.done() for task in gpud.guests._tasks.values()) == 1)
    told = [log for log in logs if log["log_level"] == "warning"]
    assert len(told) == 1, "the same reason is told once"
    assert "no such device" in told[0]["error"]
    gpud.guests.attach(instance)
    await until(lambda: guest.console.stream and guest.channels[CHANNEL_NAME].stream)


async def test_why_a_running_guest_is_not_heard_is_known_until_it_is(
    gpud: Gpud, instance: Instance, guest: Guest, libvirtd: LibvirtDaemon
) -> None:
    libvirtd.fault("openChannel", error("no such device"), times=2)
    gpud.guests.attach(instance)
    await until(lambda: "no such device" in gpud.guests.unheard(instance.upstream_id))
    nap = await gpud.steps.await_ready(instance)
    assert isinstance(nap, Nap)
    assert "no such device" in nap.why

    def heard() -> bool:
        gpud.guests.attach(instance)
        return not gpud.guests.unheard(instance.upstream_id)

    await until(heard)
    assert guest.channels[CHANNEL_NAME].stream


async def test_readers_of_a_guest_that_is_gone_end_quietly(
    gpud: Gpud, instance: Instance, watched: Watched, guest: Guest
) -> None:
    with structlog.testing.capture_logs() as logs:
        guest.powers_off()
        await until(lambda: all(task.done() for task in gpud.guests._tasks.values()))
        gpud.guests.attach(instance)
        await until(lambda: all(task.done() for task in gpud.guests._tasks.values()))
    assert {log["log_level"] for log in logs} <= {"debug"}


async def test_detach_closes_both_streams_before_it_returns(
    gpud: Gpud, instance: Instance, watched: Watched, guest: Guest
) -> None:
    guest.boots()
    guest.prints(b"booting\n")
    await until(lambda: watched().guest_boots)
    await gpud.guests.detach(instance.upstream_id)
    assert guest.console.stream is None
    assert guest.channels[CHANNEL_NAME].stream is None
    assert gpud.guests._tasks == {}
    await gpud.guests.detach(instance.upstream_id)


async def test_detach_in_the_middle_of_a_pause_closes_the_stream_too(
    gpud: Gpud,
    instance: Instance,
    watched: Watched,
    guest: Guest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guests_module, "_PAUSE_AFTER_REPORT_S", 1000)
    guest.boots()
    await until(lambda: watched().guest_boots)
    await asyncio.sleep(0.005)
    await gpud.guests.detach(instance.upstream_id)
    assert guest.channels[CHANNEL_NAME].stream is None


async def test_close_leaves_what_comes_later_for_the_next_reader(
    gpud: Gpud, instance: Instance, watched: Watched, guest: Guest
) -> None:
    await gpud.guests.close()
    guest.boots()
    gpud.guests.attach(instance)
    await until(lambda: watched().guest_boots == 1)


# -- console ---------------------------------------------------------------------------------------


async def test_the_console_is_kept_and_capped(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon
) -> None:
    gpud = await start_gpud(console_log_kib=64)
    instance = await gpud.reach(await gpud.order(), Step.RUNNING)
    guest = libvirtd.guests[instance.domain_uuid]
    await until(lambda: guest.console.stream)
    for number in range(40):
        guest.prints(f"line {number}\n".encode() + b"x" * 8000)
        await asyncio.sleep(0.001)
    guest.prints(b"\nlast words\n")
    await until(lambda: gpud.consoles.read(instance.upstream_id).endswith(b"last words\n"))
    assert gpud.consoles.size(instance.upstream_id) <= 64 * 1024


async def test_a_console_that_cannot_be_written_is_told_of_and_harms_nothing_else(
    gpud: Gpud,
    instance: Instance,
    watched: Watched,
    guest: Guest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, structlog.testing.capture_logs() as logs:
        broken.setattr(gpud.consoles, "append", full)
        guest.prints(b"lost\n")
        await until(lambda: logs)
    assert [log["error"] for log in logs] == ["No space left on device"]
    guest.boots()
    await until(lambda: watched().guest_boots == 1)
    gpud.guests.attach(instance)
    guest.prints(b"kept\n")
    await until(lambda: gpud.consoles.read(instance.upstream_id) == b"kept\n")


# -- a guest that stands still ---------------------------------------------------------------------


async def test_a_paused_guest_is_told_of_once_and_so_is_that_it_goes_on(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon
) -> None:
    gpud = await start_gpud()
    instance = await gpud.running()
    guest = libvirtd.guests[instance.domain_uuid]

    async def seen() -> list[str]:
        for _ in range(2):
            current = gpud.store.live[instance.upstream_id]
            await gpud.steps.functions()[Step.RUNNING](current)
        events = await gpud.store.events(instance.upstream_id)
        return [event.became for event in events if event.became in {"paused", "resumed"}]

    assert await seen() == []
    guest.state = libvirt.VIR_DOMAIN_PAUSED
    assert await seen() == ["paused"]
    guest.state = libvirt.VIR_DOMAIN_RUNNING
    assert await seen() == ["paused", "resumed"]
    guest.state = libvirt.VIR_DOMAIN_PAUSED
    assert await seen() == ["paused", "resumed", "paused"]
    assert list(libvirtd.guests.values()) == [guest]
    await gpud.deleted(instance)


async def test_a_guest_whose_disk_was_full_is_resumed_when_there_is_room_again(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon
) -> None:
    gpud = await start_gpud()
    instance = await gpud.running()
    guest = libvirtd.guests[instance.domain_uuid]

    async def look() -> None:
        await gpud.steps.functions()[Step.RUNNING](gpud.store.live[instance.upstream_id])

    guest.cannot_write()
    await look()
    assert guest.state == libvirt.VIR_DOMAIN_PAUSED
    guest.disk_full = False
    await look()
    assert guest.state == libvirt.VIR_DOMAIN_RUNNING
    await look()
    events = await gpud.store.events(instance.upstream_id)
    assert [event.became for event in events][-2:] == ["paused", "resumed"]
    await gpud.deleted(instance)


async def test_a_guest_that_the_operator_has_paused_stays_so(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon
) -> None:
    gpud = await start_gpud()
    instance = await gpud.running()
    guest = libvirtd.guests[instance.domain_uuid]
    guest.state = libvirt.VIR_DOMAIN_PAUSED
    for _ in range(2):
        await gpud.steps.functions()[Step.RUNNING](gpud.store.live[instance.upstream_id])
    assert guest.state == libvirt.VIR_DOMAIN_PAUSED
    await gpud.deleted(instance)
