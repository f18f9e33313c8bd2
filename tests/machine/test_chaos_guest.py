"""What guests do, and what happens to their QEMU: instances come back, or end, and others do not notice.

They run the small guest, on SeaBIOS: emulated, OVMF takes minutes to reset.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.machine.conftest import InOrder, ServerFactory
from tests.machine.gpu_ai import GpuAi
from tests.machine.server import GpudServer
from tests.machine.small_guest import small_guest

BOOT_TIMEOUT_S = 180
ORDER = {"gpu_type": "h100_sxm", "gpu_count": 1, "tier": "on_demand"}
ENDS_IN_MANY_WAYS = """\
case $BOOT in
  2) echo c >/proc/sysrq-trigger ;;
  3) reboot -f ;;
  4) poweroff -f ;;
esac
"""
FLOODS = """\
while :; do
  read -r made_up </proc/sys/kernel/random/uuid
  echo "gpud1 started $made_up"
  echo "gpud1 exited $made_up 1"
done >"$PORT" &
while :; do
  echo "a line that a tenant prints without end, and without any reason that anybody knows of"
done
"""
POLITE_S = 2.0
"""How long any answer may take while a guest floods, on a machine whose cores are all busy."""
CONSOLE_KIB = 256


def bios(**guest: Any) -> dict[str, dict[str, Any]]:
    """The config of a server for small guests."""
    return {"guest": {"firmware": "bios", "console_log_kib": CONSOLE_KIB, **guest}}


async def printed(server: GpudServer, upstream_id: str, text: str) -> None:
    """Wait until a guest has printed something."""
    async with asyncio.timeout(BOOT_TIMEOUT_S):
        while text not in console(server, upstream_id):
            await asyncio.sleep(0.2)


def console(server: GpudServer, upstream_id: str) -> str:
    """What is kept of a guest's console."""
    logs = sorted((server.state_dir / "console").glob(f"{upstream_id}.*"), reverse=True)
    with suppress(FileNotFoundError):  # the two take turns
        return "".join(log.read_text(errors="replace") for log in logs)
    return ""


@asynccontextmanager
async def polled(caller: GpuAi, upstream_id: str) -> AsyncIterator[set[str]]:
    """Ask for an instance all the while, as GPU.ai does; gives the set of statuses seen."""
    seen: set[str] = set()

    async def poll() -> None:
        while True:
            seen.add((await caller.show(upstream_id))["status"])
            await asyncio.sleep(0.3)

    task = asyncio.create_task(poll())
    try:
        yield seen
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.long
async def test_a_guest_that_ends_is_started_again_on_its_disk(
    start_server: ServerFactory, in_order: InOrder
) -> None:
    """Its QEMU is killed; it panics, reboots, and powers itself off; each time it comes back."""
    server, caller = await start_server(await small_guest(), **bios())
    accepted = await caller.order(instance_id="a", startup_script=ENDS_IN_MANY_WAYS, **ORDER)
    upstream_id = accepted["upstream_id"]
    await caller.wait_for(upstream_id, "running", BOOT_TIMEOUT_S)
    qemu = server.qemu(upstream_id)
    assert qemu is not None
    async with polled(caller, upstream_id) as seen:
        began = time.monotonic()
        os.kill(qemu, signal.SIGKILL)
        await printed(server, upstream_id, "small guest: boot 2")
        for boot in (3, 4, 5):
            await printed(server, upstream_id, f"small guest: boot {boot}")
        took_s = (time.monotonic() - began) / 4
    assert seen == {"running"}
    # The reboot was inside the same QEMU, the three others were not.
    assert server.ask("SELECT restarts FROM instance") == [(3,)]
    assert server.qemu(upstream_id) not in {None, qemu}
    await in_order(server, "QEMU killed, guest panicked, rebooted, powered off (QEMU)", took_s, 4)


async def test_a_guest_that_powers_itself_off_ends_where_that_is_the_policy(
    start_server: ServerFactory, in_order: InOrder
) -> None:
    server, caller = await start_server(await small_guest(), **bios(on_poweroff="terminate"))
    script = "sleep 3; poweroff -f"
    accepted = await caller.order(instance_id="a", startup_script=script, **ORDER)
    upstream_id = accepted["upstream_id"]
    await caller.wait_for(upstream_id, "running", BOOT_TIMEOUT_S)
    began = time.monotonic()
    await caller.wait_for(upstream_id, "terminated", BOOT_TIMEOUT_S)
    assert server.qemu(upstream_id) is None
    assert server.leftovers() == []
    took_s = time.monotonic() - began
    await in_order(server, "guest powered off for good (QEMU)", took_s)


async def test_an_image_that_is_no_system_ends_as_an_error_and_holds_nothing(
    start_server: ServerFactory, in_order: InOrder, tmp_path: Path
) -> None:
    no_system = tmp_path / "empty.raw"
    halts = bytes.fromhex("fa f4 ebfd")  # cli; again: hlt; jmp again
    no_system.write_bytes(halts.ljust(510, b"\0") + b"\x55\xaa" + bytes(2**20))
    server, caller = await start_server(no_system, deadlines={"await_ready_s": 3}, **bios())
    accepted = await caller.order(instance_id="a", **ORDER)
    took_s = await ended_as_error(server, caller, accepted["upstream_id"], "did not report")
    await in_order(server, "guest never boots (QEMU)", took_s)
    assert len(await caller.wait_for_offerings()) == 4


async def test_a_guest_that_panics_at_every_boot_ends_as_an_error_and_holds_nothing(
    start_server: ServerFactory, in_order: InOrder
) -> None:
    server, caller = await start_server(await small_guest(), **bios(max_restarts=1))
    script = "sleep 1; echo c >/proc/sysrq-trigger"
    accepted = await caller.order(instance_id="a", startup_script=script, **ORDER)
    took_s = await ended_as_error(server, caller, accepted["upstream_id"], "in a row")
    await in_order(server, "guest panics at every boot (QEMU)", took_s)
    assert len(await caller.wait_for_offerings()) == 4


async def ended_as_error(
    server: GpudServer, caller: GpuAi, upstream_id: str, message: str
) -> float:
    """Wait for the error and for the end of all that the instance had; how long the latter took."""
    instance = await caller.wait_for(upstream_id, "error", BOOT_TIMEOUT_S)
    assert message in instance["status_message"]
    began = time.monotonic()
    async with asyncio.timeout(30):
        while server.ask("SELECT 1 FROM instance WHERE step != 'ended'"):
            await asyncio.sleep(0.05)
    assert server.qemu(upstream_id) is None
    assert not [path for path in server.leftovers() if "/instances/" in path]
    return time.monotonic() - began


async def test_a_flood_from_inside_a_guest_holds_up_nobody(
    start_server: ServerFactory, in_order: InOrder
) -> None:
    server, caller = await start_server(await small_guest(), **bios())
    flooding = await caller.order(instance_id="flood", startup_script=FLOODS, **ORDER)
    upstream_id = flooding["upstream_id"]
    await caller.wait_for(upstream_id, "running", BOOT_TIMEOUT_S)
    began = time.monotonic()
    other = await caller.order(instance_id="other", **ORDER)
    slowest_s = 0.0
    while (await caller.show(other["upstream_id"]))["status"] == "creating":
        asked = time.monotonic()
        await caller.show(upstream_id)
        slowest_s = max(slowest_s, time.monotonic() - asked)
        assert asked - began < BOOT_TIMEOUT_S
        await asyncio.sleep(0.2)
    took_s = time.monotonic() - began
    assert (await caller.show(other["upstream_id"]))["status"] == "running"
    assert slowest_s < POLITE_S
    assert memory_mib(server.daemon.pid) < 256
    kept = sum(log.stat().st_size for log in (server.state_dir / "console").glob("*"))
    assert kept <= 2 * CONSOLE_KIB * 1024
    # Made-up boots count one a minute at most.
    ((boots,),) = server.ask("SELECT guest_boots FROM instance WHERE instance_id = 'flood'")
    assert boots <= 1 + (time.monotonic() - began) / 60 + 1
    for one in (flooding, other):
        await caller.delete(one["upstream_id"])
    for one in (flooding, other):
        await caller.wait_for(one["upstream_id"], "terminated", 60)
    assert server.leftovers() == []
    await in_order(server, "guest floods its report channel and console (QEMU)", took_s)


def memory_mib(pid: int) -> float:
    """Memory that a process has now."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024
