"""The fake kernel does what the real one does; the rest of it is shown by the tests that use it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpud.errors import GpudError
from gpud.host import iommu, livebus, pci
from gpud.model import PciAddress
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.kernel_tree import GPU_BARS
from tests.unit.fakes.orders import quick_directory

GPU = PciAddress.parse("0000:41:00.0")
BUS = "bus/pci"


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    with quick_directory() as root:
        yield FakeKernel(root)


async def write(kernel: FakeKernel, path: str, text: str) -> None:
    await kernel.write(kernel.sysfs.root / BUS / path, text, 5)


async def refused(kernel: FakeKernel, path: str, text: str) -> int | None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno is what is asked for
        await write(kernel, path, text)
    return caught.value.errno


async def test_a_function_reads_as_a_real_one_would(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, driver="nvidia", group=12, numa_node=1)

    function = (await livebus.read(kernel.sysfs)).get(GPU)

    assert function is not None
    assert function.answers
    assert (function.ids, function.driver) == ("10de:2330", "nvidia")
    assert kernel.override(GPU) == ""
    assert (function.iommu_group, function.numa_node, function.power_state) == (12, 1, "D0")
    assert [bar.size_bytes for bar in function.bars] == list(GPU_BARS)
    assert all(bar.is_64bit and bar.prefetchable for bar in function.bars)
    assert function.reset_methods == ("flr", "bus")
    assert list(map(str, function.upstream)) == ["0000:40:01.0"]
    assert iommu.facts(kernel.sysfs.root, kernel.proc) == iommu.IommuFacts(
        present=True,
        interrupt_remapping=True,
        unsafe_interrupts_allowed=False,
        acs_override=False,
    )


async def test_a_probe_follows_the_override_then_the_ids(kernel: FakeKernel) -> None:
    kernel.add_function(GPU)
    kernel.add_driver("nouveau", "10de:2330")
    kernel.add_driver("nvidia", "10de:2330")
    await write(kernel, f"devices/{GPU}/driver_override", "nvidia\n")
    await write(kernel, "drivers_probe", str(GPU))
    by_override = kernel.driver(GPU)
    await write(kernel, "drivers/nvidia/unbind", str(GPU))
    await write(kernel, f"devices/{GPU}/driver_override", "\n")
    await write(kernel, "drivers_probe", str(GPU))
    await write(kernel, "drivers_probe", str(GPU))  # it has one: nothing to do

    assert by_override == "nvidia"
    assert kernel.driver(GPU) == "nouveau"


async def test_an_override_that_no_driver_meets_leaves_it_without(kernel: FakeKernel) -> None:
    kernel.add_function(GPU)
    kernel.add_driver("nvidia", "10de:2330")
    await write(kernel, f"devices/{GPU}/driver_override", "none")

    await write(kernel, "drivers_probe", str(GPU))

    assert kernel.driver(GPU) is None


async def test_nonsense_is_refused_with_the_real_errno(kernel: FakeKernel) -> None:
    kernel.add_function(GPU)

    assert await refused(kernel, "drivers/vfio-pci/unbind", str(GPU)) == errno.ENODEV
    assert await refused(kernel, "drivers_probe", "0000:99:00.0") == errno.ENODEV
    assert await refused(kernel, "drivers_probe", "what?") == errno.ENODEV
    assert await refused(kernel, f"devices/{GPU}/reset", "0") == errno.EINVAL
    assert await refused(kernel, f"devices/{GPU}/reset_method", "magic") == errno.EINVAL
    assert await refused(kernel, f"devices/{GPU}/power/control", "off") == errno.EINVAL
    assert await refused(kernel, "drivers/vfio-pci/bind", str(GPU)) == errno.EACCES
    assert await refused(kernel, f"devices/{GPU}/no_such_file", "1") == errno.ENOENT
    await write(kernel, f"devices/{GPU}/reset_method", "")
    assert await refused(kernel, f"devices/{GPU}/reset", "1") == errno.ENOTTY
    await write(kernel, f"devices/{GPU}/reset_method", "default")
    await write(kernel, f"devices/{GPU}/reset", "1")
    assert kernel.resets == [(GPU, "flr")]


async def test_a_hanging_write_holds_the_function_until_it_is_released(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, driver="nvidia")
    other = kernel.add_function("0000:42:00.0", driver="nvidia")
    kernel.hang("drivers/nvidia/unbind", of=GPU)

    for path, text in (("drivers/nvidia/unbind", str(GPU)), (f"devices/{GPU}/reset", "1")):
        with pytest.raises(GpudError, match="stuck inside the kernel"):
            await write(kernel, path, text)
    with pytest.raises(GpudError, match="stuck inside the kernel"):
        await kernel.sysfs.config_header(GPU, 5)
    headers = await kernel.sysfs.config_headers([GPU, other], 5)
    assert [len(headers[one]) for one in (GPU, other)] == [0, 64]
    with pytest.raises(GpudError, match="not one file could be read"):
        await kernel.sysfs.config_headers([GPU], 5)
    await write(kernel, "drivers/nvidia/unbind", str(other))
    before = kernel.driver(GPU)
    kernel.release("drivers/nvidia/unbind")

    assert before == "nvidia"
    assert kernel.driver(GPU) is None
    await write(kernel, f"devices/{GPU}/reset", "1")


async def test_a_function_pulled_while_a_write_hangs_is_simply_gone(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, driver="nvidia", group=12)
    kernel.slow("nvidia", 1)
    kernel.sleepy(GPU, 1)
    await write(kernel, f"devices/{GPU}/reset", "1")
    await write(kernel, "drivers/nvidia/unbind", str(GPU))
    await write(kernel, "drivers_probe", str(GPU))
    kernel.hang("drivers_probe")
    with pytest.raises(GpudError):
        await write(kernel, "drivers_probe", str(GPU))
    kernel.pull(GPU)

    kernel.release("drivers_probe")
    await kernel.sleep(5)

    assert kernel.addresses == []
    assert pci.read(kernel.sysfs.root).functions == {}
    assert await refused(kernel, f"devices/{GPU}/reset", "1") == errno.ENOENT


async def test_a_fault_lasts_until_it_is_mended(kernel: FakeKernel) -> None:
    kernel.add_function(GPU)
    kernel.fail(f"devices/{GPU}/reset", errno.EIO)

    assert await refused(kernel, f"devices/{GPU}/reset", "1") == errno.EIO
    assert await refused(kernel, f"devices/{GPU}/reset", "1") == errno.EIO
    kernel.mend(f"devices/{GPU}/reset")
    await write(kernel, f"devices/{GPU}/reset", "1")
    assert kernel.writes == [(f"devices/{GPU}/reset", "1")] * 3


async def test_a_dead_function_keeps_its_files_and_says_nothing(kernel: FakeKernel) -> None:
    kernel.add_function(GPU)
    kernel.fall_off(GPU)
    await write(kernel, f"devices/{GPU}/reset", "1")

    assert await kernel.sysfs.config_header(GPU, 5) == b"\xff" * 64
    kernel.add_function("0000:42:00.0")
    tree = await livebus.read(kernel.sysfs)
    assert [one.answers for one in tree.functions.values()] == [False, True]


def test_links_are_relative_like_those_of_sysfs(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, driver="nvidia", group=12)

    assert (kernel.home(GPU) / "driver").readlink() == Path("../../../../bus/pci/drivers/nvidia")
    assert kernel.sysfs.iommu_group(GPU) == 12
