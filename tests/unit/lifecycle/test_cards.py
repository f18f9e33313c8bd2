"""Cards between the host, guests and quarantine, on a kernel that reacts to what is written."""

from __future__ import annotations

import errno
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpud.host.nvml import Nvml
from gpud.inventory import CardState
from gpud.lifecycle.outcome import Hop
from gpud.model import Instance, PciAddress, Status, Step
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import gpu, until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Gpud, Hold, drivers, make_server

GPU, AUDIO = PciAddress(0, 1, 0, 0), PciAddress(0, 1, 0, 1)
OTHER = PciAddress(0, 2, 0, 0)
AS_FOUND = {("nvidia", ""), ("snd_hda_intel", "")}


async def sellable(gpud: Gpud) -> list[PciAddress]:
    await gpud.inventory.refresh()
    return [one.address for one in gpud.inventory.host.gpus]


def quarantines(gpud: Gpud) -> dict[PciAddress, str]:
    return {at: one.reason for at, one in gpud.store.quarantines.items()}


async def why_it_failed(gpud: Gpud, instance: Instance) -> str:
    """What the operator reads of an order that ended as an error."""
    assert (await gpud.ended(instance)).status is Status.ERROR
    events = await gpud.store.events(instance.upstream_id)
    return next(event.why for event in events if event.became.startswith("error/"))


async def test_a_guest_has_the_card_with_its_companion_and_gives_them_back_reset(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    instance = await gpud.running()
    assert instance.former_drivers == {GPU: "nvidia", AUDIO: "snd_hda_intel"}
    assert {kernel.driver(GPU), kernel.driver(AUDIO)} == {"vfio-pci"}
    card = gpud.inventory.card(GPU)
    assert card is not None
    assert card.state is CardState.IN_USE
    await gpud.deleted(instance)
    assert kernel.resets == [(GPU, "flr")]  # no bus reset with a companion on the bus
    assert set(drivers(kernel).values()) == AS_FOUND
    assert await sellable(gpud) == [GPU, OTHER]


async def test_the_former_driver_is_written_down_before_the_first_act(
    start_gpud: StartGpud, kernel: FakeKernel
) -> None:
    hold = Hold(Step.BIND_GPUS, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    await hold.reached.wait()
    assert gpud.store.live[instance.upstream_id].former_drivers[GPU] == "nvidia"
    assert kernel.writes == []
    hold.open.set()
    await gpud.deleted(await gpud.reach(instance, Step.RUNNING))


async def test_a_card_on_vfio_pci_since_boot_stays_there(
    start_gpud: StartGpud, kernel: FakeKernel
) -> None:
    for function in kernel.addresses:
        kernel.pull(function)
    third = kernel.add_function("0000:03:00.0", driver="vfio-pci", group=3)
    gpud = await start_gpud()
    assert await sellable(gpud) == [third]
    await gpud.deleted(await gpud.running())
    assert kernel.driver(third) == "vfio-pci"
    assert kernel.resets == [(third, "bus")]
    assert await sellable(gpud) == [third]


async def test_a_card_that_a_process_holds_fails_the_order_by_name_and_stays_where_it_is(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    kernel.add_node(GPU, "drm/card0")
    kernel.add_process(4242, "train.py", "/dev/dri/card0")
    instance = await gpud.order()
    assert "train.py (pid 4242)" in await why_it_failed(gpud, instance)
    assert instance.grant.gpus[0].address == GPU
    assert kernel.writes == []
    assert quarantines(gpud) == {}


async def test_a_group_that_got_a_foreign_device_fails_the_order_by_name(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    instance = await gpud.order()
    kernel.add_function("0000:09:00.0", vendor=0x8086, device=0x10D3, class_code=0x020000,
                        driver="e1000e", group=1)  # fmt: skip
    assert "0000:09:00.0" in await why_it_failed(gpud, instance)
    assert kernel.writes == []
    assert await sellable(gpud) == [OTHER]


@pytest.mark.parametrize("how", ["refused", "hangs"])
async def test_a_reset_that_fails_quarantines_the_card_and_no_other(
    gpud: Gpud, start_gpud: StartGpud, kernel: FakeKernel, how: str
) -> None:
    first, second = await gpud.running("a"), await gpud.running("b")
    if how == "hangs":
        kernel.hang(f"devices/{GPU}/reset")
    else:
        kernel.fail(f"devices/{GPU}/reset", errno.EIO)
    ended = await gpud.deleted(first)
    await gpud.deleted(second)
    assert ended.status is Status.TERMINATED
    assert list(quarantines(gpud)) == [GPU]
    assert f"{GPU}/reset" in quarantines(gpud)[GPU]
    assert (kernel.driver(GPU), kernel.driver(OTHER)) == ("vfio-pci", "nvidia")
    assert await sellable(gpud) == [OTHER]

    await gpud.stop()
    gpud = await start_gpud()
    assert await sellable(gpud) == [OTHER]
    await gpud.store.release(GPU)
    assert GPU in {one.address for one in gpud.inventory.host.gpus}


async def test_a_card_that_does_not_come_back_alive_is_quarantined(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    instance = await gpud.running()
    kernel.sleepy(GPU, 3600)
    await gpud.deleted(instance)
    assert "does not answer" in quarantines(gpud)[GPU]
    assert await sellable(gpud) == [OTHER]


async def test_a_driver_that_does_not_take_its_card_back_quarantines_it(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    instance = await gpud.running()
    kernel.refuse(GPU, "nvidia")
    await gpud.deleted(instance)
    assert "nvidia did not take" in quarantines(gpud)[GPU]


async def test_a_bind_that_fails_ends_the_order_and_gives_back_what_was_taken(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    kernel.refuse(GPU, "vfio-pci")
    instance = await gpud.order()
    assert "vfio-pci did not take" in await why_it_failed(gpud, instance)
    assert set(drivers(kernel).values()) == AS_FOUND
    assert quarantines(gpud) == {}


async def test_a_card_pulled_from_a_running_guest_ends_the_instance_as_an_error(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    instance, other = await gpud.running("a"), await gpud.running("b")
    kernel.fall_off(GPU)
    kernel.fall_off(AUDIO)
    assert str(GPU) in await why_it_failed(gpud, instance)
    assert GPU in quarantines(gpud)
    assert gpud.store.live[other.upstream_id].status is Status.RUNNING
    await gpud.deleted(other)
    assert await sellable(gpud) == [OTHER]


async def test_a_card_pulled_from_a_booting_guest_fails_the_order(
    gpud: Gpud, kernel: FakeKernel, libvirtd: LibvirtDaemon
) -> None:
    libvirtd.on_start = lambda _guest: None
    instance = await gpud.reach(await gpud.order(), Step.AWAIT_READY)
    kernel.pull(GPU)
    assert str(GPU) in await why_it_failed(gpud, instance)


async def test_an_operators_quarantine_keeps_a_card_from_the_next_instance_only(gpud: Gpud) -> None:
    instance = await gpud.running()
    await gpud.store.quarantine(GPU, "fans rattle")
    await gpud.store.quarantine(GPU, "said twice")
    await gpud.inventory.refresh()
    assert (await gpud.reach(instance, Step.RUNNING)).status is Status.RUNNING
    await gpud.deleted(instance)
    assert quarantines(gpud) == {GPU: "fans rattle"}
    assert await sellable(gpud) == [OTHER]


async def test_a_card_pulled_while_it_is_cleaned_is_quarantined(
    start_gpud: StartGpud, kernel: FakeKernel
) -> None:
    hold = Hold(Step.CLEAN_GPUS, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.running()
    await gpud.store.request_delete(instance.upstream_id)
    await hold.reached.wait()
    card = gpud.inventory.card(GPU)
    assert card is not None
    assert card.state is CardState.CLEANING
    kernel.pull(GPU)
    hold.open.set()
    assert (await gpud.ended(instance)).status is Status.TERMINATED
    assert "gone from the bus" in quarantines(gpud)[GPU]
    assert await sellable(gpud) == [OTHER]


NVML_OF = """
card {0}
    ids 10de:2330
    subsystem 10de:16c1
    name NVIDIA H100 80GB HBM3
    uuid GPU-00000000-0000-4000-8000-0000000000{0.bus:02x}
    memory_mib 81559
    memory_used_mib {1}
    {2}
"""
IDLE = ("0", "persistence 1")


@pytest.mark.real_command(Path(sys.executable).name)
@pytest.mark.parametrize(
    ("told", "why"),
    [
        (("0", "ecc_uncorrected 3 3"), "3 uncorrected memory errors"),
        (("70000", "persistence 1"), "70000 MiB of its memory are still in use"),
        (("70000", "compute 1"), "used by process 1"),
        (IDLE, None),
    ],
)
async def test_what_nvml_tells_of_a_card_after_a_guest_decides_whether_it_is_sold(
    start_gpud: StartGpud,
    nvml_library: Path,
    tmp_path: Path,
    told: tuple[str, str],
    why: str | None,
) -> None:
    text = tmp_path / "nvml.txt"
    text.write_text("".join(NVML_OF.format(gpu, *IDLE) for gpu in (GPU, OTHER)))
    env = {"LD_LIBRARY_PATH": str(nvml_library), "FAKE_NVML": str(text)}
    gpud = await start_gpud(nvml=Nvml(env=env))
    assert await sellable(gpud) == [GPU, OTHER]
    instance = await gpud.running()
    text.write_text(NVML_OF.format(GPU, *told) + NVML_OF.format(OTHER, *IDLE))
    await gpud.deleted(instance)
    assert quarantines(gpud).get(GPU, "") == "" if why is None else why in quarantines(gpud)[GPU]
    assert OTHER not in quarantines(gpud)


async def test_a_stand_in_is_handed_over_by_nobody(gpud: Gpud, kernel: FakeKernel) -> None:
    await gpud.worker.close()
    instance = await gpud.order()
    bare = replace(instance, grant=replace(instance.grant, gpus=(gpu(1),)))
    for step in (Step.CHECK_GPUS, Step.BIND_GPUS, Step.CLEAN_GPUS, Step.RETURN_GPUS):
        outcome = await gpud.steps.functions()[step](bare)
        assert isinstance(outcome, Hop)
        assert not outcome.changes
    assert kernel.writes == []


async def test_after_a_reboot_of_the_server_the_guest_has_the_same_cards(
    gpud: Gpud, start_gpud: StartGpud, libvirtd: LibvirtDaemon, state_dir: Path
) -> None:
    instance = await gpud.running()
    await gpud.kill()
    libvirtd.guests.clear()
    kernel = make_server(state_dir / "host-after-reboot")

    gpud = await start_gpud(server=kernel)
    await until(lambda: libvirtd.guests)
    again = await gpud.reach(instance, Step.RUNNING)
    assert again.grant == instance.grant
    assert {kernel.driver(GPU), kernel.driver(AUDIO)} == {"vfio-pci"}
    await gpud.deleted(again)
    assert set(drivers(kernel).values()) == AS_FOUND
