"""A host whose disk is full, read-only, or shared with a second gpud, and whose images are spoilt."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gpud.errors import Code, GpudError
from gpud.model import Instance, Status, Step
from gpud.store import Store
from tests.faults import FaultLog
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.orders import until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Gpud, Hold, make_server

SIZE_KIB = 8192
# An order takes some 500 KiB: a seed, a disk and its rows.
LEFT_KIB = range(0, 640, 4 if "CHAOS_CRASHES" in os.environ else 92)

pytestmark = [
    pytest.mark.real_command("mount", "umount"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system"),
]


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """A real file system that is small."""
    directory = tmp_path / "state"
    directory.mkdir()
    options = f"size={SIZE_KIB}k,mode=0711"
    mounting = ["mount", "-t", "tmpfs", "-o", options, "gpud-test", str(directory)]
    if subprocess.run(mounting, check=False, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """Elsewhere: sysfs needs no room on a disk."""
    return make_server(tmp_path / "host")


def remount(directory: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", directory], check=True)


@contextmanager
def full(state_dir: Path, left_kib: int) -> Iterator[None]:
    """Leave so much room, and nothing more."""
    ballast = state_dir / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(ballast, max(0, ballast.stat().st_size - left_kib * 1024))
    facts = os.statvfs(state_dir)
    assert facts.f_bavail * facts.f_bsize <= (left_kib + 4) * 1024
    yield
    ballast.unlink()


async def settled(gpud: Gpud) -> None:
    def still() -> bool:
        gpud.worker.wake_all()
        live = gpud.store.live.values()
        return all((one.status, one.step) == (Status.RUNNING, Step.RUNNING) for one in live)

    await until(still)


async def all_is_well(gpud: Gpud) -> None:
    """An order can be had, and everything be given back."""
    await settled(gpud)
    for instance in list(gpud.store.live.values()):
        await gpud.deleted(instance)
    await gpud.deleted(await gpud.running("afterwards"))
    assert gpud.directories() == set()
    assert gpud.store.quarantines == {}


@pytest.mark.parametrize("left_kib", LEFT_KIB)
async def test_a_disk_that_fills_up_at_any_write(
    gpud: Gpud, state_dir: Path, fault_log: FaultLog, left_kib: int
) -> None:
    with full(state_dir, left_kib):
        with suppress(GpudError):
            await gpud.order()
        for _ in range(30):
            gpud.worker.wake_all()
            await asyncio.sleep(0.002)
    with fault_log.recovering("disk full, on a real file system, at any write") as findings:
        await all_is_well(gpud)
        findings.extend(await gpud.findings())


@pytest.mark.parametrize("left_kib", LEFT_KIB[::4])
async def test_a_disk_that_is_full_when_an_instance_is_deleted(
    gpud: Gpud, state_dir: Path, fault_log: FaultLog, left_kib: int
) -> None:
    instance = await gpud.running()
    with full(state_dir, left_kib // 16):
        with suppress(GpudError):
            await gpud.store.request_delete(instance.upstream_id)
        for _ in range(30):
            gpud.worker.wake_all()
            await asyncio.sleep(0.002)
    with fault_log.recovering("disk full, on a real file system, at a DELETE") as findings:
        await all_is_well(gpud)
        findings.extend(await gpud.findings())


@pytest.mark.parametrize("left_kib", LEFT_KIB[::4])
async def test_killed_on_a_full_disk_it_starts_when_there_is_room(
    start_gpud: StartGpud, state_dir: Path, fault_log: FaultLog, left_kib: int
) -> None:
    gpud = await start_gpud()
    with full(state_dir, left_kib):
        with suppress(GpudError):
            await gpud.order()
        await asyncio.sleep(0.01)
        await gpud.kill()
    with fault_log.recovering("killed on a full disk") as findings:
        gpud = await start_gpud()
        await all_is_well(gpud)
        findings.extend(await gpud.findings())


async def test_a_read_only_state_directory_is_refused_and_left_as_it_was(
    start_gpud: StartGpud, state_dir: Path, fault_log: FaultLog
) -> None:
    gpud = await start_gpud()
    instance = await gpud.running()
    await gpud.stop()
    remount(state_dir, "ro")
    with pytest.raises(GpudError) as caught:
        await Store.open(state_dir)
    assert caught.value.code is Code.STATE_UNUSABLE
    remount(state_dir, "rw")
    with fault_log.recovering("state directory read-only at start") as findings:
        gpud = await start_gpud()
        await settled(gpud)
        assert list(gpud.store.live) == [instance.upstream_id]
        findings.extend(await gpud.findings())


async def test_a_second_gpud_is_refused_and_the_first_does_not_notice(
    gpud: Gpud, state_dir: Path, fault_log: FaultLog
) -> None:
    instance = await gpud.running()
    with fault_log.recovering("a second gpud on the same state directory") as findings:
        with pytest.raises(GpudError, match="another gpud is running"):
            await Store.open(state_dir)
        await gpud.deleted(instance)
        await all_is_well(gpud)
        findings.extend(await gpud.findings())


def missing(image: Path) -> None:
    image.unlink()


def truncated(image: Path) -> None:
    os.truncate(image, image.stat().st_size // 2)


def changed(image: Path) -> None:
    content = image.read_bytes()
    image.chmod(0o644)
    image.write_bytes(content[:-8] + b"tampered")


@pytest.mark.parametrize("spoil", [missing, truncated, changed])
async def test_an_image_that_is_spoilt_before_the_disk_is_made_fails_the_order(
    start_gpud: StartGpud, state_dir: Path, fault_log: FaultLog, spoil: Callable[[Path], None]
) -> None:
    hold = Hold(Step.CLONE_DISK, after=False)
    gpud = await start_gpud(hold)
    instance: Instance = await gpud.order()
    await hold.reached.wait()
    (image,) = (state_dir / "images").glob("*.qcow2")
    spoil(image)
    with fault_log.recovering(f"base image {spoil.__name__}") as findings:
        hold.open.set()
        ended = await gpud.ended(instance)
        assert ended.status is Status.ERROR
        with pytest.raises(GpudError):
            await gpud.order("next")
        findings.extend(await gpud.findings())
