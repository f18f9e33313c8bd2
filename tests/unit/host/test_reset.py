from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpud.errors import GpudError
from gpud.host.patience import DEFAULT_LIMITS
from gpud.host.reset import KERNELS_CHOICE, Resets, by_strength
from gpud.host.sysfs import Sysfs, SysfsError
from gpud.model import PciAddress
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.orders import quick_directory

GPU = PciAddress.parse("0000:41:00.0")
AUDIO = PciAddress.parse("0000:41:00.1")
METHOD_FILE = f"devices/{GPU}/reset_method"
RESET_FILE = f"devices/{GPU}/reset"


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    with quick_directory() as root:
        yield FakeKernel(root)


async def reset(kernel: FakeKernel, address: PciAddress = GPU) -> str | None:
    return await Resets(kernel.sysfs, DEFAULT_LIMITS).reset(address)


@pytest.mark.parametrize(
    ("methods", "chosen"),
    [
        ("device_specific acpi flr bus", "device_specific"),
        ("acpi flr af_flr pm bus", "bus"),
        ("flr cxl_bus", "cxl_bus"),
        ("flr acpi", "acpi"),
        ("pm flr", "flr"),
        ("pm af_flr", "af_flr"),
        ("pm", "pm"),
        ("pm from_the_future", "from_the_future"),
        ("af_flr from_the_future", "af_flr"),
    ],
)
def test_the_strongest_method_is_chosen(methods: str, chosen: str) -> None:
    assert by_strength(methods.split())[0] == chosen


async def test_the_method_is_written_the_reset_done_and_the_list_put_back(
    kernel: FakeKernel,
) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "pm", "bus"))

    assert await reset(kernel) == "bus"
    assert kernel.resets == [(GPU, "bus")]
    assert kernel.writes == [(METHOD_FILE, "bus"), (RESET_FILE, "1"), (METHOD_FILE, "flr pm bus")]


async def test_a_list_that_an_operator_narrowed_is_kept_to(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "pm", "bus"))
    (kernel.home(GPU) / "reset_method").write_text("flr\n")

    assert await reset(kernel) == "flr"
    assert kernel.resets == [(GPU, "flr")]
    assert kernel.writes == [(RESET_FILE, "1")]


async def test_a_kernel_without_the_list_resets_as_it_likes(kernel: FakeKernel) -> None:
    kernel.add_function(GPU)
    (kernel.home(GPU) / "reset_method").unlink()

    assert await reset(kernel) == KERNELS_CHOICE
    assert len(kernel.resets) == 1


async def test_a_gpu_without_reset_is_refused(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, reset_methods=())

    with pytest.raises(GpudError, match="cannot be reset: the kernel offers no method"):
        await reset(kernel)


async def test_a_gpu_whose_resets_were_all_disabled_is_refused(kernel: FakeKernel) -> None:
    kernel.add_function(GPU)
    (kernel.home(GPU) / "reset_method").write_text("")

    with pytest.raises(GpudError, match="cannot be reset"):
        await reset(kernel)
    assert kernel.writes == []


async def test_a_companion_without_reset_is_left_as_it_is(kernel: FakeKernel) -> None:
    kernel.add_function(AUDIO, reset_methods=())

    assert await reset(kernel, AUDIO) is None
    assert kernel.writes == []


async def test_a_reset_that_fails_is_not_followed_by_a_weaker_one(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    kernel.fail(RESET_FILE, errno.EIO)

    with pytest.raises(SysfsError, match=r"Input/output error \(EIO\)"):
        await reset(kernel)
    assert kernel.resets == []
    assert kernel.writes == [(METHOD_FILE, "bus"), (RESET_FILE, "1"), (METHOD_FILE, "flr bus")]


async def test_a_method_that_cannot_be_had_after_all_is_followed_by_the_next(
    kernel: FakeKernel,
) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    kernel.add_function(AUDIO)  # found later, and it shares the bus

    assert await reset(kernel) == "flr"
    assert kernel.resets == [(GPU, "flr")]
    assert kernel.writes == [
        (METHOD_FILE, "bus"),  # EINVAL
        (METHOD_FILE, "flr"),
        (RESET_FILE, "1"),
        (METHOD_FILE, "flr bus"),  # EINVAL: what the kernel itself had listed
        (METHOD_FILE, "default"),
    ]
    assert (kernel.home(GPU) / "reset_method").read_text() == "flr\n"


async def test_a_method_that_could_not_be_confirmed_is_followed_by_the_next(
    kernel: FakeKernel,
) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    kernel.unconfirm(GPU, "bus")

    assert await reset(kernel) == "flr"
    assert kernel.resets == [(GPU, "bus"), (GPU, "flr")]
    assert (kernel.home(GPU) / "reset_method").read_text() == "flr bus\n"


async def test_when_no_method_can_be_confirmed_the_last_error_is_told(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    kernel.unconfirm(GPU, "bus")
    kernel.unconfirm(GPU, "flr")

    with pytest.raises(SysfsError, match="ENOTTY"):
        await reset(kernel)
    assert kernel.resets == [(GPU, "bus"), (GPU, "flr")]


async def test_a_function_that_died_of_its_reset_gets_no_other(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    kernel.unconfirm(GPU, "bus")
    kernel.sleepy(GPU, 1000)

    with pytest.raises(SysfsError, match="ENOTTY"):
        await reset(kernel)
    assert kernel.resets == [(GPU, "bus")]


async def test_a_list_that_cannot_be_put_back_is_told(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    refuse_list(kernel, errno.ENODEV)

    with pytest.raises(SysfsError, match="ENODEV"):
        await reset(kernel)


def refuse_list(kernel: FakeKernel, number: int) -> None:
    """Let the kernel refuse the list of two methods, and no other write."""

    class Files:
        async def write(self, file: Path, text: str, timeout_s: float) -> None:
            if text == "flr bus":
                raise OSError(number, "refused")
            await kernel.write(file, text, timeout_s)

        read, read_many = kernel.read, kernel.read_many

    kernel.sysfs = Sysfs(kernel.sysfs.root, Files())


async def test_the_error_of_the_reset_is_told_even_when_the_list_cannot_be_put_back(
    kernel: FakeKernel,
) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    kernel.fail(RESET_FILE, errno.EIO)

    refuse_list(kernel, errno.ENODEV)

    with pytest.raises(SysfsError, match=r"\(EIO\)"):
        await reset(kernel)


async def test_a_reset_that_hangs_ends_with_its_limit_and_nothing_more_is_asked(
    kernel: FakeKernel,
) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    kernel.hang(RESET_FILE)
    before = kernel.now

    with pytest.raises(SysfsError, match="stuck inside the kernel"):
        await reset(kernel)
    assert kernel.now == before + 75
    assert kernel.writes[-1] == (RESET_FILE, "1")


async def test_after_a_reset_that_hung_all_methods_are_tried_again(kernel: FakeKernel) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    kernel.hang(RESET_FILE)
    resets = Resets(kernel.sysfs, DEFAULT_LIMITS)
    with pytest.raises(SysfsError, match="stuck inside the kernel"):
        await resets.reset(GPU)
    assert kernel.sysfs.text(Path("bus/pci") / METHOD_FILE) == "bus"

    kernel.release(RESET_FILE)
    kernel.unconfirm(GPU, "bus")
    assert await resets.reset(GPU) == "flr"
    assert kernel.sysfs.text(Path("bus/pci") / METHOD_FILE) == "flr bus"


async def test_the_only_method_listed_fails_with_a_word_on_the_others(kernel: FakeKernel) -> None:
    """As after a reset that hung, and a restart of the daemon, which knows the list no longer."""
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    await kernel.sysfs.write(Path("bus/pci") / METHOD_FILE, "bus", 5)
    kernel.unconfirm(GPU, "bus")
    with pytest.raises(SysfsError, match="ENOTTY") as caught:
        await reset(kernel)
    assert f"echo default >{kernel.sysfs.root}/bus/pci/{METHOD_FILE}" in caught.value.hint


async def test_a_crash_between_choice_and_reset_changes_nothing_for_the_next_try(
    kernel: FakeKernel,
) -> None:
    kernel.add_function(GPU, reset_methods=("flr", "bus"))
    await kernel.sysfs.write(Path("bus/pci") / METHOD_FILE, "bus", 5)

    assert await reset(kernel) == "bus"
