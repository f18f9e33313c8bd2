"""The host lets gpud down: its disk is full or read-only, its images are damaged, it has no descriptors.

The state directory is a small real ext4 of its own, which only root can mount.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.machine.conftest import InOrder, ServerFactory
from tests.machine.gpu_ai import GpuAi
from tests.machine.points import Held
from tests.machine.server import GpudServer
from tests.machine.small_guest import small_guest
from tests.machine.test_chaos_guest import BOOT_TIMEOUT_S, ORDER, bios, console

DISK_MIB = 6 * 1024
OFFERED_TIMEOUT_S = 90
"""Nothing is offered for a minute after an order could not be recorded."""
_BLOCK_BYTES = 4096
_OPTIONS = "loop,errors=remount-ro"
OFFER = {
    "gpu_type": "h100_sxm",
    "gpu_counts": [1, 2],
    "per_gpu": {"cpu_cores": 1, "memory_gib": 0.5, "storage_gib": 1},
    "price_per_gpu_hour": {"on_demand": 3.49},
}
RESERVE = {"cpu_cores": 0, "memory_gib": 1, "storage_gib": 1}


class SmallDisk:
    """The file system of a state directory."""

    def __init__(self, at: Path, backing: Path) -> None:
        self._at = at
        self._backing = backing
        self._filler = at / "filler"

    def mount(self) -> None:
        with self._backing.open("wb") as file:
            file.truncate(DISK_MIB * 2**20)
        subprocess.run(
            ["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", self._backing], check=True
        )
        mount = ["mount", "-o", _OPTIONS, str(self._backing), str(self._at)]
        if subprocess.run(mount, check=False).returncode != 0:
            pytest.skip("this machine has no loop devices")
        self._at.chmod(0o711)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self._at], check=True)

    def fill(self) -> None:
        """Take every free block, larger pieces first; the file system needs some for itself."""
        with self._filler.open("ab") as file:
            piece = 2**30
            while piece >= _BLOCK_BYTES:
                try:
                    os.posix_fallocate(file.fileno(), file.tell(), piece)
                except OSError:
                    piece //= 2
                file.seek(0, os.SEEK_END)

    def free(self) -> None:
        self._filler.unlink()

    def fail(self) -> None:
        """Let ext4 find an error in itself; it then turns read-only, as after a fault of the disk."""
        subprocess.run(["sync", "--file-system", self._at], check=True)  # what is the test's own
        device = subprocess.run(
            ["findmnt", "-n", "-o", "SOURCE", self._at], check=True, capture_output=True, text=True
        ).stdout.strip()
        Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("a test")
        with pytest.raises(OSError, match="Read-only"):
            (self._at / "probe").touch()

    def repair(self) -> None:
        """Check the file system, as one does after a fault, and mount it again.

        A copy of it: other tests' QEMUs, in mount namespaces of their own, keep the broken one.
        """
        self.unmount()
        mended = self._backing.with_suffix(".mended")
        subprocess.run(["cp", "--sparse=always", self._backing, mended], check=True)
        checked = subprocess.run(["/usr/sbin/e2fsck", "-p", "-f", mended], check=False)
        assert checked.returncode in {0, 1}
        self._backing = mended
        subprocess.run(["mount", "-o", _OPTIONS, mended, self._at], check=True)


@pytest.fixture
def small_disk(state_dir: Path, tmp_path: Path) -> Iterator[SmallDisk]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    disk = SmallDisk(state_dir, tmp_path / "disk")
    disk.mount()
    for log in ("gpud.log", "issuer.log"):  # not in its way, and not silenced with it
        (state_dir / log).symlink_to(tmp_path / log)
    yield disk
    disk.unmount()
    shutil.rmtree(state_dir, ignore_errors=True)


async def small_server(start_server: ServerFactory, *prefix: str) -> tuple[GpudServer, GpuAi]:
    server: GpudServer
    caller: GpuAi
    server, caller = await start_server(
        await small_guest(), prefix, host_reserve=RESERVE, offers=[OFFER], **bios()
    )
    return server, caller


async def refused(caller: GpuAi, instance_id: str) -> None:
    """An order is refused: for good, or in a way that GPU.ai repeats."""
    status, answer = await caller.call(
        "POST", "/v1/instances", {**ORDER, "instance_id": instance_id}
    )
    assert (status, answer["code"]) in {(409, "no_capacity"), (503, "record_unavailable")}, answer


async def settled(server: GpudServer, caller: GpuAi, instance_id: str) -> tuple[str, float]:
    """Wait until an order runs, or has ended and holds nothing; which of them, and how long it took."""
    began = time.monotonic()
    async with asyncio.timeout(BOOT_TIMEOUT_S):
        while server.step(instance_id) not in {"running", "ended"}:
            await asyncio.sleep(0.1)
    took_s = time.monotonic() - began
    return (await caller.show(instance_id))["status"], took_s


@asynccontextmanager
async def gone(caller: GpuAi, *instance_ids: str) -> AsyncIterator[None]:
    """Delete orders at the end."""
    yield
    for instance_id in instance_ids:
        await caller.delete(instance_id)
    for instance_id in instance_ids:
        await caller.wait_for(instance_id, "terminated", 60)


@pytest.mark.long
@pytest.mark.parametrize(
    "point",
    ["before:clone_disk", "after:clone_disk", "before:write_seed", "after:start_domain",
     "after:stop_domain", "after:return_gpus"],
)  # fmt: skip
async def test_disk_full_in_the_middle_of_an_order(
    small_disk: SmallDisk, start_server: ServerFactory, in_order: InOrder, tmp_path: Path,
    point: str,
) -> None:  # fmt: skip
    server, caller = await small_server(start_server)
    server.daemon.stop()
    held = Held(server, tmp_path / "held", point)
    await server.start_daemon()
    await caller.wait_for_offerings(OFFERED_TIMEOUT_S)
    await caller.order(instance_id="a", **ORDER)
    if "return" in point or "stop" in point:
        await caller.wait_for("a", "running", BOOT_TIMEOUT_S)
        await caller.delete("a")
    await held.at(point)
    before = (await caller.show("a"))["status"]
    small_disk.fill()
    held.let_go(point)
    await asyncio.sleep(3)
    assert (await caller.show("a"))["status"] in {before, "error"}
    await refused(caller, "b")
    small_disk.free()
    status, took_s = await settled(server, caller, "a")
    assert status in ({"running", "error"} if before == "creating" else {"terminated"})
    await in_order(server, f"disk full {point.replace(':', ' ')} (QEMU)", took_s)
    async with gone(caller, "a", "b"):
        await caller.wait_for_offerings(OFFERED_TIMEOUT_S)
        await caller.order(instance_id="b", **ORDER)
        await caller.wait_for("b", "running", BOOT_TIMEOUT_S)
    assert server.leftovers() == []


@pytest.mark.long
async def test_a_full_disk_pauses_a_running_guest_which_is_shown_and_mended(
    small_disk: SmallDisk, start_server: ServerFactory, in_order: InOrder
) -> None:
    """QEMU pauses a guest that cannot write; when there is room gpud resumes it. Nothing is lost."""
    server, caller = await small_server(start_server)
    script = (
        "while :; do read -r up idle </proc/uptime; echo up $up; echo $up >>/disk/up; sync; done"
    )
    accepted = await caller.order(instance_id="a", startup_script=script, **ORDER)
    await caller.wait_for("a", "running", BOOT_TIMEOUT_S)
    upstream_id = accepted["upstream_id"]
    qemu = server.qemu(upstream_id)
    small_disk.fill()
    mends: dict[str, str] = {}
    async with asyncio.timeout(60):
        while upstream_id not in mends:
            await asyncio.sleep(1)
            mends = {one["subject"]: one["mend"] for one in await server.findings()}
    assert f"virsh resume gpud-{upstream_id}" in mends[upstream_id]
    await refused(caller, "b")
    small_disk.free()
    began = time.monotonic()  # from now on gpud resumes it, at its next look
    before = console(server, upstream_id).count("\nup ")
    async with asyncio.timeout(60):
        while console(server, upstream_id).count("\nup ") < before + 3:
            await asyncio.sleep(0.5)
    took_s = time.monotonic() - began
    assert server.qemu(upstream_id) == qemu
    assert server.ask("SELECT restarts FROM instance") == [(0,)]
    await in_order(server, "disk full under a running guest (QEMU)", took_s)
    async with gone(caller, "a"):
        pass


@pytest.mark.long
async def test_a_state_directory_that_turns_read_only(
    small_disk: SmallDisk, start_server: ServerFactory, in_order: InOrder
) -> None:
    """The guest runs on, nothing is promised or forgotten; a mended disk and a start are all it takes."""
    server, caller = await small_server(start_server)
    accepted = await caller.order(instance_id="a", **ORDER)
    await caller.wait_for("a", "running", BOOT_TIMEOUT_S)
    upstream_id = accepted["upstream_id"]
    qemu = server.qemu(upstream_id)
    small_disk.fail()
    await refused(caller, "b")
    status, answer = await caller.call("DELETE", "/v1/instances/a")
    assert (status, answer["code"]) == (503, "record_unavailable")
    assert (await caller.show("a"))["status"] == "running"
    server.daemon.stop()
    server.daemon.start()
    with pytest.raises(AssertionError, match="gpud ended"):
        await server.daemon.listening(server.port)
    assert "ead-only file system" in server.daemon.tail()
    assert server.qemu(upstream_id) == qemu
    await server.remove_domains()  # its disk is in the way of the repair
    small_disk.repair()
    began = time.monotonic()
    await server.start_daemon()
    async with asyncio.timeout(BOOT_TIMEOUT_S):
        while server.qemu(upstream_id) is None:
            await asyncio.sleep(0.2)
    took_s = time.monotonic() - began
    assert (await caller.show("a"))["status"] == "running"
    await in_order(server, "state directory turned read-only (QEMU)", took_s)
    async with gone(caller, "a"):
        pass


async def test_a_base_image_that_is_damaged_is_noticed_before_it_is_sold(
    start_server: ServerFactory, in_order: InOrder, tmp_path: Path
) -> None:
    """Deleted, truncated, or written to: noticed at the order, and again before the disk is cloned.

    One that keeps its size and its times is only noticed by ``verify``, which reads it whole.
    """
    server, caller = await small_server(start_server)
    server.daemon.stop()
    held = Held(server, tmp_path / "held", "before:clone_disk")
    await server.start_daemon()
    await caller.wait_for_offerings(OFFERED_TIMEOUT_S)
    (image,) = (server.state_dir / "images").glob("*.qcow2")
    await caller.order(instance_id="a", **ORDER)
    await held.at("before:clone_disk")
    whole = image.read_bytes()
    with image.open("r+b") as file:
        file.truncate(len(whole) // 2)
    await refused(caller, "b")
    held.let_go("before:clone_disk")
    failed = await caller.wait_for("a", "error", 30)
    assert "its disk could not be made" in failed["status_message"]
    await settled(server, caller, "a")

    for damage in (image.unlink, lambda: image.write_bytes(whole)):
        damage()
        await refused(caller, "b")
    began = time.monotonic()
    small = str(await small_guest())
    await server.gpud("image", "add", small, "--name", "demo", "--unsealed")
    await caller.wait_for_offerings(OFFERED_TIMEOUT_S)
    took_s = time.monotonic() - began
    await caller.order(instance_id="b", **ORDER)
    await caller.wait_for("b", "running", BOOT_TIMEOUT_S)
    await in_order(server, "base image truncated, deleted, overwritten (QEMU)", took_s, 3)
    async with gone(caller, "b"):
        pass


async def test_too_few_file_descriptors_refuse_callers_and_lose_nothing(
    start_server: ServerFactory, in_order: InOrder
) -> None:
    server, caller = await small_server(start_server, "prlimit", "--nofile=64:64")
    accepted = await caller.order(instance_id="a", **ORDER)
    connections = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(100)]
    await asyncio.sleep(2)
    assert server.daemon.running
    for _, writer in connections:
        writer.close()
    began = time.monotonic()
    await caller.wait_for("a", "running", BOOT_TIMEOUT_S)
    other = await caller.order(instance_id="b", **ORDER)
    took_s = time.monotonic() - began
    await caller.wait_for("b", "running", BOOT_TIMEOUT_S)
    assert server.ask("SELECT restarts FROM instance") == [(0,), (0,)]
    assert None not in {server.qemu(one["upstream_id"]) for one in (accepted, other)}
    await in_order(server, "file descriptors exhausted (QEMU)", took_s)
    async with gone(caller, "a", "b"):
        pass
