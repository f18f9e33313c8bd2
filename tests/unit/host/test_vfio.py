"""The hand-over on a kernel that reacts, at every point at which one may fail, hang or crash."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpud.errors import Code, GpudError
from gpud.host import iommu, livebus, pci
from gpud.host.kernelfiles import InChildren
from gpud.host.patience import Limits
from gpud.host.sysfs import Sysfs, attribute
from gpud.host.vfio import Handover
from gpud.model import PciAddress
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.orders import quick_directory

GPU = PciAddress.parse("0000:41:00.0")
AUDIO = PciAddress.parse("0000:41:00.1")
CARD = [GPU, AUDIO]
FORMER = {GPU: "nvidia", AUDIO: "snd_hda_intel"}


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    with quick_directory() as root:
        yield server(root)


@pytest.fixture
def handover(kernel: FakeKernel) -> Handover:
    return over(kernel)


def server(root: Path) -> FakeKernel:
    """A GPU with its audio, each on its host driver."""
    kernel = FakeKernel(root)
    kernel.add_function(GPU, driver="nvidia", group=12)
    kernel.add_function(
        AUDIO,
        device=0x22BA,
        class_code=0x040300,
        driver="snd_hda_intel",
        group=12,
        bars=(16384,),
        reset_methods=("flr",),
    )
    return kernel


def over(kernel: FakeKernel) -> Handover:
    return Handover(kernel.sysfs, kernel.proc, sleep=kernel.sleep, clock=kernel.clock)


async def refusal(act: Awaitable[Any], code: Code = Code.GPU_UNUSABLE) -> GpudError:
    with pytest.raises(GpudError) as caught:
        await act
    assert caught.value.code is code
    return caught.value


def drivers(kernel: FakeKernel) -> dict[PciAddress, str]:
    return {address: kernel.driver(address) or "" for address in CARD}


# -- former drivers --------------------------------------------------------------------------------


def test_former_drivers_are_read_and_nothing_is_written(
    kernel: FakeKernel, handover: Handover
) -> None:
    bare = kernel.add_function("0000:42:00.0")

    assert handover.former_drivers([*CARD, bare]) == FORMER | {bare: ""}
    assert kernel.writes == []


def test_former_driver_of_a_function_that_is_gone_is_not_guessed(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.pull(GPU)

    with pytest.raises(GpudError, match="is gone from the bus"):
        handover.former_drivers(CARD)


# -- bind ------------------------------------------------------------------------------------------


async def test_bind_hands_companions_over_first_and_keeps_all_out_of_d3(
    kernel: FakeKernel, handover: Handover
) -> None:
    await handover.bind(CARD)

    assert drivers(kernel) == {GPU: "vfio-pci", AUDIO: "vfio-pci"}
    assert kernel.writes == [
        (f"devices/{AUDIO}/power/control", "on"),
        (f"devices/{AUDIO}/d3cold_allowed", "0"),
        (f"devices/{AUDIO}/driver_override", "vfio-pci"),
        ("drivers/snd_hda_intel/unbind", str(AUDIO)),
        ("drivers_probe", str(AUDIO)),
        (f"devices/{AUDIO}/power/control", "on"),
        (f"devices/{GPU}/power/control", "on"),
        (f"devices/{GPU}/d3cold_allowed", "0"),
        (f"devices/{GPU}/driver_override", "vfio-pci"),
        ("drivers/nvidia/unbind", str(GPU)),
        ("drivers_probe", str(GPU)),
        (f"devices/{GPU}/power/control", "on"),
    ]
    assert kernel.sysfs.text(attribute(GPU, "power_state")) == "D0"


async def test_bind_done_already_writes_nothing(kernel: FakeKernel, handover: Handover) -> None:
    await handover.bind(CARD)
    kernel.writes.clear()

    await handover.bind(CARD)

    assert kernel.writes == []


async def test_bind_takes_a_function_without_driver(kernel: FakeKernel, handover: Handover) -> None:
    bare = kernel.add_function("0000:42:00.0")

    await handover.bind([bare])

    assert kernel.driver(bare) == "vfio-pci"


async def test_bind_leaves_what_is_on_vfio_since_boot_but_for_its_power(
    kernel: FakeKernel, handover: Handover
) -> None:
    boot = kernel.add_function("0000:42:00.0", driver="vfio-pci")

    await handover.bind([boot])

    assert [path.rpartition("/")[2] for path, _ in kernel.writes] == ["control", "d3cold_allowed"]
    assert kernel.override(boot) == ""


async def test_bridges_are_left_alone_both_ways(kernel: FakeKernel, handover: Handover) -> None:
    bridge = kernel.add_function(
        "0000:40:01.0", class_code=0x060400, driver="pcieport", group=12, upstream=()
    )

    await handover.bind([bridge])
    await handover.give_back({bridge: "pcieport"})

    assert kernel.driver(bridge) == "pcieport"
    assert kernel.writes == []


async def test_files_that_an_old_kernel_lacks_are_not_written(
    kernel: FakeKernel, handover: Handover
) -> None:
    (kernel.home(GPU) / "d3cold_allowed").unlink()

    await handover.bind([GPU])

    assert (f"devices/{GPU}/d3cold_allowed", "0") not in kernel.writes


async def test_bind_of_a_function_that_is_gone_says_so(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.pull(GPU)

    error = await refusal(handover.bind(CARD))

    assert "0000:41:00.0 is gone from the bus" in error.detail


async def test_a_driver_that_does_not_let_go_is_named_with_its_function(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.fail("drivers/nvidia/unbind", errno.EBUSY)

    error = await refusal(handover.bind(CARD))

    assert error.detail.startswith("nvidia did not let go of 0000:41:00.0: ")
    assert "Device or resource busy (EBUSY)" in error.detail
    assert kernel.driver(GPU) == "nvidia"


async def test_an_unbind_that_hangs_ends_with_its_limit_and_says_what_it_takes(
    kernel: FakeKernel,
) -> None:
    handover = Handover(kernel.sysfs, kernel.proc, Limits(driver_s=20), kernel.sleep, kernel.clock)
    kernel.hang("drivers/nvidia/unbind")
    before = kernel.now

    error = await refusal(handover.bind(CARD))

    assert "nvidia did not let go of 0000:41:00.0" in error.detail
    assert "stuck inside the kernel" in error.detail
    assert "only a reboot frees it" in error.hint
    assert kernel.now == before + 20


async def test_an_unbind_that_ended_late_is_taken_up_where_it_stands(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.hang("drivers/nvidia/unbind")
    await refusal(handover.bind(CARD))

    kernel.release("drivers/nvidia/unbind")
    await handover.bind(CARD)

    assert drivers(kernel) == {GPU: "vfio-pci", AUDIO: "vfio-pci"}


async def test_a_function_that_vfio_does_not_take_is_told(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.refuse(GPU, "vfio-pci")

    error = await refusal(handover.bind(CARD))

    assert error.detail == "vfio-pci did not take 0000:41:00.0, which has no driver now"
    assert "module of vfio-pci" in error.hint


async def test_a_probe_that_is_refused_is_told(kernel: FakeKernel, handover: Handover) -> None:
    kernel.fail("drivers_probe", errno.EINVAL, of=GPU)

    error = await refusal(handover.bind(CARD))

    assert error.detail.startswith("vfio-pci did not take 0000:41:00.0: ")
    assert "(EINVAL)" in error.detail


async def test_a_driver_that_shows_up_late_is_waited_for(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.slow("snd_hda_intel", 4)
    await handover.bind(CARD)

    await handover.give_back(FORMER)

    assert drivers(kernel) == FORMER


# -- reset -----------------------------------------------------------------------------------------


async def test_reset_begins_with_the_gpu_and_tells_the_methods(
    kernel: FakeKernel, handover: Handover
) -> None:
    methods = await handover.reset([AUDIO, GPU])

    assert methods == {GPU: "flr", AUDIO: "flr"}
    assert kernel.resets == [(GPU, "flr"), (AUDIO, "flr")]


async def test_a_companion_without_reset_is_not_among_the_methods(
    kernel: FakeKernel, handover: Handover
) -> None:
    usb = kernel.add_function("0000:41:00.2", class_code=0x0C0330, reset_methods=())

    assert await handover.reset([GPU, usb]) == {GPU: "flr"}


async def test_reset_waits_until_the_function_answers(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.sleepy(GPU, 3)
    before = kernel.now

    await handover.reset([GPU])

    assert 3 <= kernel.now - before < 4


async def test_a_function_that_stays_away_after_its_reset_is_told(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.sleepy(GPU, 60)

    error = await refusal(handover.reset(CARD))

    assert error.detail == "0000:41:00.0 does not answer 5 s after its reset"
    assert "power cycle" in error.hint


async def test_a_function_that_vanishes_in_its_reset_is_told(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.sleepy(GPU, 1)

    async def pull(seconds: float) -> None:
        await kernel.sleep(seconds)
        if GPU in kernel.addresses:
            kernel.pull(GPU)

    handover = Handover(kernel.sysfs, kernel.proc, sleep=pull, clock=kernel.clock)

    assert "does not answer" in (await refusal(handover.reset([GPU]))).detail
    assert "gone from the bus" in (await refusal(handover.reset([GPU]))).detail


async def test_a_function_whose_config_space_hangs_is_told_at_once(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.hang(f"devices/{AUDIO}/config")
    before = kernel.now

    error = await refusal(handover.reset([AUDIO]))

    assert "could not be read" in error.detail
    assert kernel.now == before + Limits().write_s


# -- verify ----------------------------------------------------------------------------------------


async def test_verify_passes_a_card_that_is_as_it_was(
    kernel: FakeKernel, handover: Handover
) -> None:
    before = pci.read(kernel.sysfs.root)
    await handover.bind(CARD)
    await handover.reset(CARD)

    await handover.verify(CARD, before)
    await handover.verify(CARD, before.functions)


async def test_verify_tells_everything_that_is_wrong(
    kernel: FakeKernel, handover: Handover
) -> None:
    before = pci.read(kernel.sysfs.root)
    kernel.fall_off(GPU)
    (kernel.home(AUDIO) / "power_state").write_text("D3hot\n")

    error = await refusal(handover.verify(CARD, before))

    assert (
        "0000:41:00.0: it does not answer; 0000:41:00.1: it is in power state D3hot" in error.detail
    )


async def test_verify_has_nothing_to_say_for_what_it_never_saw(handover: Handover) -> None:
    error = await refusal(handover.verify(CARD, {}))

    assert error.detail == "0000:41:00.0 has nothing to be compared with"


async def test_verify_of_a_function_that_is_gone_says_so(
    kernel: FakeKernel, handover: Handover
) -> None:
    before = pci.read(kernel.sysfs.root)
    kernel.pull(AUDIO)

    assert "0000:41:00.1 is gone" in (await refusal(handover.verify(CARD, before))).detail


# -- give back -------------------------------------------------------------------------------------


async def test_give_back_returns_the_gpu_first_and_overrides_nothing_in_the_end(
    kernel: FakeKernel, handover: Handover
) -> None:
    await handover.bind(CARD)
    kernel.writes.clear()

    await handover.give_back(FORMER)

    assert drivers(kernel) == FORMER
    assert [kernel.override(address) for address in CARD] == ["", ""]
    assert kernel.writes == [
        (f"devices/{GPU}/driver_override", "nvidia"),
        ("drivers/vfio-pci/unbind", str(GPU)),
        ("drivers_probe", str(GPU)),
        (f"devices/{GPU}/driver_override", ""),
        (f"devices/{AUDIO}/driver_override", "snd_hda_intel"),
        ("drivers/vfio-pci/unbind", str(AUDIO)),
        ("drivers_probe", str(AUDIO)),
        (f"devices/{AUDIO}/driver_override", ""),
    ]


async def test_give_back_gets_the_very_driver_among_several_that_would_take_it(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.add_driver("vfio-pci", "10de:2330")  # told the ids, and loaded before nvidia
    await handover.bind(CARD)

    await handover.give_back(FORMER)

    assert drivers(kernel) == FORMER


async def test_give_back_leaves_without_driver_what_came_without(
    kernel: FakeKernel, handover: Handover
) -> None:
    bare = kernel.add_function("0000:42:00.0")
    await handover.bind([bare])

    await handover.give_back({bare: ""})

    assert kernel.driver(bare) is None
    assert kernel.override(bare) == ""


async def test_give_back_leaves_on_vfio_what_came_with_it(
    kernel: FakeKernel, handover: Handover
) -> None:
    boot = kernel.add_function("0000:42:00.0", driver="vfio-pci")
    await handover.bind([boot])
    kernel.writes.clear()

    await handover.give_back({boot: "vfio-pci"})

    assert kernel.driver(boot) == "vfio-pci"
    assert kernel.writes == []


async def test_give_back_binds_to_vfio_what_came_with_it_and_lost_it(
    kernel: FakeKernel, handover: Handover
) -> None:
    await handover.give_back({GPU: "vfio-pci"})

    assert kernel.driver(GPU) == "vfio-pci"
    assert kernel.override(GPU) == "vfio-pci"


async def test_a_driver_that_is_no_longer_loaded_is_told(
    kernel: FakeKernel, handover: Handover
) -> None:
    await handover.bind(CARD)
    kernel.remove_driver("nvidia")

    error = await refusal(handover.give_back(FORMER))

    assert error.detail == "nvidia did not take 0000:41:00.0, which has no driver now"
    assert "module of nvidia is loaded" in error.hint


async def test_vfio_that_does_not_let_go_is_told(kernel: FakeKernel, handover: Handover) -> None:
    await handover.bind(CARD)
    kernel.hang("drivers/vfio-pci/unbind")

    error = await refusal(handover.give_back(FORMER))

    assert error.detail.startswith("vfio-pci did not let go of 0000:41:00.0")


async def test_give_back_of_a_function_that_is_gone_says_so(
    kernel: FakeKernel, handover: Handover
) -> None:
    await handover.bind(CARD)
    kernel.pull(GPU)

    assert "is gone from the bus" in (await refusal(handover.give_back(FORMER))).detail


# -- crashes ---------------------------------------------------------------------------------------


class Crash(BaseException):
    """The daemon dies."""


def crashing(kernel: FakeKernel, survived: int, *, after: bool) -> Sysfs:
    """The tree of a daemon that dies in the write after so many, before or after its effect."""
    left = survived

    class Files:
        async def write(self, file: Path, text: str, timeout_s: float) -> None:
            nonlocal left
            left -= 1
            if left < 0 and not after:
                raise Crash
            await kernel.write(file, text, timeout_s)
            if left < 0:
                raise Crash

        async def read(self, file: Path, size: int, timeout_s: float) -> bytes:
            return await kernel.read(file, size, timeout_s)

        read_many = kernel.read_many

    return Sysfs(kernel.sysfs.root, Files())


@given(
    crashes=st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=4),
    back=st.booleans(),
    former=st.sampled_from(["nvidia", "", "vfio-pci"]),
)
def test_every_act_can_be_repeated_after_a_crash_at_any_write(
    crashes: list[tuple[int, bool]], *, back: bool, former: str
) -> None:
    with quick_directory() as root:
        asyncio.run(_crash(Path(root), crashes, former, back=back))


async def _crash(root: Path, crashes: list[tuple[int, bool]], former: str, *, back: bool) -> None:
    kernel = FakeKernel(root)
    gpu = kernel.add_function(GPU, driver=former or None)
    had = over(kernel).former_drivers([gpu])
    if back:
        await over(kernel).bind([gpu])
    act: Callable[[Handover], Awaitable[None]] = (
        (lambda handover: handover.give_back(had))
        if back
        else (lambda handover: handover.bind([gpu]))
    )
    for survived, after in crashes:
        sysfs = crashing(kernel, survived, after=after)
        try:
            await act(Handover(sysfs, kernel.proc, sleep=kernel.sleep, clock=kernel.clock))
        except Crash:
            continue

    await act(over(kernel))

    assert kernel.driver(gpu) == ((former or None) if back else "vfio-pci")
    if back and former != "vfio-pci":
        assert kernel.override(gpu) == ""


# -- check -----------------------------------------------------------------------------------------


async def test_check_passes_a_card_with_nothing_in_the_way(handover: Handover) -> None:
    await handover.check(CARD, {})


async def test_check_tells_what_forbids_a_bind_before_who_is_using_it(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.add_process(77, "python3", "/dev/vfio/12")
    busy = await refusal(handover.check(CARD, {}), Code.GPU_BUSY)
    kernel.remove_driver("vfio-pci")
    unusable = await refusal(handover.check(CARD, {}))

    assert "0000:41:00.0 (10de:2330) is in use by python3 (pid 77)" in busy.detail
    assert "vfio-pci is not loaded" in unusable.detail


async def test_check_believes_nvml_that_nothing_keeps_a_gpu_in_persistence_mode(
    kernel: FakeKernel, handover: Handover
) -> None:
    kernel.add_process(77, "nvidia-persistenced", readable=False)
    busy = await refusal(handover.check(CARD, {}), Code.GPU_BUSY)

    assert f"nvidia-smi -i {GPU} -pm 0" in busy.detail
    await handover.check(CARD, {}, persistence_off=[GPU])


async def test_obstacles_of_many_cards_are_each_its_own(
    kernel: FakeKernel, handover: Handover
) -> None:
    other = kernel.add_function("0000:42:00.0", driver="nvidia", group=13)
    held = kernel.add_function("0000:43:00.0", driver="nvidia", group=14)
    kernel.add_process(77, "python3", "/dev/vfio/14")
    kernel.add_process(78, "nvidia-persistenced", readable=False)
    (kernel.home(other) / "reset").unlink()
    tree = await livebus.read(kernel.sysfs)
    facts = iommu.facts(kernel.sysfs.root, kernel.proc)
    sets = {tuple(CARD), (other,), (held,)}

    found = handover.obstacles(sets, tree, facts, persistence_off=[GPU, other, held])

    assert found.keys() == sets
    assert found[tuple(CARD)] == ()
    assert ["cannot be reset" in one.what for one in found[(other,)]] == [True]
    assert [one.users for one in found[(held,)]] == [("process 77 (python3)",)]


# -- through real children -------------------------------------------------------------------------


@pytest.mark.real_command("dd", "od")
async def test_a_whole_hand_over_through_real_children(kernel: FakeKernel) -> None:
    """Each write is made by a child into the tree's real file; the kernel reacts when it is there."""

    class Files(InChildren):
        async def write(self, file: Path, text: str, timeout_s: float) -> None:
            await super().write(file, text, timeout_s)
            await kernel.write(file, text, timeout_s)

    handover = Handover(Sysfs(kernel.sysfs.root, Files()), kernel.proc)
    before = pci.read(kernel.sysfs.root)

    await handover.bind(CARD)
    taken = drivers(kernel)
    await handover.reset(CARD)
    await handover.verify(CARD, before)
    await handover.give_back(FORMER)

    assert taken == {GPU: "vfio-pci", AUDIO: "vfio-pci"}
    assert kernel.resets == [(GPU, "flr"), (AUDIO, "flr")]
    assert drivers(kernel) == FORMER
