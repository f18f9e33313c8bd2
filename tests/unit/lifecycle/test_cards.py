"""Cards between the host, guests and quarantine, on a kernel that reacts to what is written."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import sys
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest

from gpud.errors import Code, GpudError
from gpud.inventory import CardState
from gpud.lifecycle import cleaning
from gpud.lifecycle.outcome import Hop
from gpud.model import Instance, PciAddress, Status, Step
from tests.unit.conftest import NvmlOn
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import Guest, LibvirtDaemon
from tests.unit.fakes.orders import gpu, until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Gpud, Hold, drivers, make_server

GPU, AUDIO = PciAddress(0, 1, 0, 0), PciAddress(0, 1, 0, 1)
OTHER = PciAddress(0, 2, 0, 0)
Write = Callable[[Path, str, float], Awaitable[None]]
AS_FOUND = {("nvidia", ""), ("snd_hda_intel", "")}


async def sellable(gpud: Gpud) -> list[PciAddress]:
    await gpud.inventory.refresh()
    return [one.address for one in gpud.inventory.host.gpus]


def quarantines(gpud: Gpud) -> dict[PciAddress, str]:
    return {at: one.reason for at, one in gpud.store.quarantines.items()}


def resets_counted(gpud: Gpud, method: str, outcome: str) -> float:
    labels = {"method": method, "outcome": outcome}
    return gpud.metrics.registry.get_sample_value("gpud_gpu_resets_total", labels) or 0


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
    # Before its guest and after it; by function, since a companion shares the bus.
    assert kernel.resets == [(GPU, "flr")] * 2
    assert resets_counted(gpud, "flr", "ok") == 2
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
    assert kernel.resets == [(third, "bus")] * 2
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
    assert resets_counted(gpud, "unknown", "failed") == 1
    assert (kernel.driver(GPU), kernel.driver(OTHER)) == ("vfio-pci", "nvidia")
    assert await sellable(gpud) == [OTHER]

    await gpud.stop()
    gpud = await start_gpud()
    assert await sellable(gpud) == [OTHER]
    with pytest.raises(GpudError):
        await gpud.cleaner.release(GPU)
    assert await sellable(gpud) == [OTHER]
    kernel.release(f"devices/{GPU}/reset")
    resets = len(kernel.resets)
    assert await gpud.cleaner.release(GPU)
    assert len(kernel.resets) > resets
    assert set(drivers(kernel).values()) == AS_FOUND
    assert await sellable(gpud) == [GPU, OTHER]
    assert not await gpud.cleaner.release(GPU)


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


async def test_a_bind_that_fails_ends_the_order_and_quarantines_the_card(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    kernel.refuse(GPU, "vfio-pci")
    instance = await gpud.order()
    assert "vfio-pci did not take" in await why_it_failed(gpud, instance)
    assert "vfio-pci did not take" in quarantines(gpud)[GPU]
    assert (await gpud.order("next")).grant.gpus[0].address == OTHER


async def test_a_guest_started_again_gets_its_cards_without_a_reset_and_waits_for_them(
    gpud: Gpud, kernel: FakeKernel, libvirtd: LibvirtDaemon
) -> None:
    instance = await gpud.running()
    resets = list(kernel.resets)
    libvirtd.guests[instance.domain_uuid].powers_off()
    await until(lambda: libvirtd.calls.count("createXML") == 2)
    assert kernel.resets == resets


async def test_a_card_pulled_from_a_running_guest_ends_the_instance_as_an_error(
    gpud: Gpud, kernel: FakeKernel, libvirtd: LibvirtDaemon
) -> None:
    instance, other = await gpud.running("a"), await gpud.running("b")
    kernel.pull(GPU)
    kernel.pull(AUDIO)
    libvirtd.guests[instance.domain_uuid].powers_off()
    assert str(GPU) in await why_it_failed(gpud, instance)
    assert GPU in quarantines(gpud)
    assert gpud.store.live[other.upstream_id].status is Status.RUNNING
    await gpud.deleted(other)
    assert await sellable(gpud) == [OTHER]


@pytest.mark.parametrize("step", [Step.CHECK_GPUS, Step.BIND_GPUS, Step.START_DOMAIN])
async def test_a_card_pulled_before_its_guest_starts_fails_the_order(
    start_gpud: StartGpud, kernel: FakeKernel, libvirtd: LibvirtDaemon, step: Step
) -> None:
    hold = Hold(step, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    await hold.reached.wait()
    for function in (GPU, AUDIO):
        kernel.pull(function)
    hold.open.set()
    assert str(GPU) in await why_it_failed(gpud, instance)
    assert "createXML" not in libvirtd.calls
    assert await sellable(gpud) == [OTHER]


@pytest.mark.parametrize("confirmed", [False, True])
async def test_a_card_that_leaves_between_two_looks_fails_the_order(
    start_gpud: StartGpud, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, confirmed: bool
) -> None:
    hold = Hold(Step.CHECK_GPUS, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    await hold.reached.wait()
    refresh = gpud.inventory.refresh

    async def pulled_and_refreshed() -> None:
        kernel.pull(GPU)
        monkeypatch.setattr(gpud.inventory, "refresh", refresh)
        await refresh()
        if confirmed:  # that it was taken out
            await gpud.inventory.confirm(GPU)

    monkeypatch.setattr(gpud.inventory, "refresh", pulled_and_refreshed)
    hold.open.set()
    fault = "it is not on the bus" if confirmed else "fell off the bus"
    assert f"GPU {GPU}: {fault}" in await why_it_failed(gpud, instance)


async def test_a_guest_that_has_run_waits_for_a_card_that_cannot_be_bound(
    start_gpud: StartGpud, kernel: FakeKernel, libvirtd: LibvirtDaemon
) -> None:
    """As after a reboot of the server, when the cards are on their own drivers again."""
    gpud = await start_gpud()
    instance = await gpud.running()
    await gpud.kill()
    rebooted = make_server(kernel.root.parent / "rebooted")
    rebooted.refuse(GPU, "vfio-pci")
    libvirtd.guests.clear()
    gpud = await start_gpud(server=rebooted)
    await until(lambda: [path for path, _ in rebooted.writes].count("drivers_probe") > 4)
    assert "createXML" not in libvirtd.calls[libvirtd.calls.index("createXML") + 1 :]
    rebooted.accept(GPU, "vfio-pci")
    assert (await gpud.reach(instance, Step.RUNNING)).status is Status.RUNNING
    assert quarantines(gpud) == {}


async def test_a_full_disk_is_no_cards_fault(
    gpud: Gpud, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_reset = gpud.store.begin_reset

    async def full_once(_gpu: PciAddress, _boot_id: str) -> None:
        monkeypatch.setattr(gpud.store, "begin_reset", begin_reset)
        raise GpudError(Code.RECORD_UNAVAILABLE, "the disk is full", retry_after_s=30)

    monkeypatch.setattr(gpud.store, "begin_reset", full_once)
    await gpud.deleted(await gpud.running())
    assert set(drivers(kernel).values()) == AS_FOUND
    assert quarantines(gpud) == {}


async def test_no_process_to_spare_is_no_cards_fault(
    gpud: Gpud, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, refused = kernel.write, 0

    async def exhausted(_file: Path, _text: str, _timeout_s: float) -> None:
        nonlocal refused
        refused += 1
        if refused > 3:
            monkeypatch.setattr(kernel, "write", write)
        raise GpudError(Code.HOST_COMMAND_FAILED, "dd could not be started", transient=True)

    instance = await gpud.running()
    monkeypatch.setattr(kernel, "write", exhausted)
    await gpud.deleted(instance)
    assert refused > 3
    assert set(drivers(kernel).values()) == AS_FOUND
    assert quarantines(gpud) == {}


async def test_no_file_descriptor_to_spare_ends_no_guest(
    gpud: Gpud, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = await gpud.running()
    listdir, refused = os.listdir, 0

    def exhausted(path: str) -> list[str]:
        nonlocal refused
        if Path(path) != kernel.sysfs.root / "bus/pci/devices":
            return listdir(path)
        refused += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def tried_often() -> bool:
        gpud.worker.wake_all()
        return refused > 3

    bus = gpud.inventory._bus
    hours = itertools.count(bus._clock() + 3600, 3600)  # no look is so soon that none is needed
    with monkeypatch.context() as patch:
        patch.setattr(bus, "_clock", lambda: next(hours))
        patch.setattr(os, "listdir", exhausted)
        await until(tried_often)
        with pytest.raises(GpudError, match="the PCI bus cannot be read"):
            await gpud.inventory.lost([GPU], fresh=True)
    assert await gpud.inventory.lost([GPU], fresh=True) == []
    assert gpud.store.live[instance.upstream_id].step is Step.RUNNING


async def test_a_second_release_of_a_card_does_not_touch_it_once_it_is_sold_again(
    gpud: Gpud, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = await gpud.running()
    kernel.fail(f"devices/{GPU}/reset", errno.EIO)
    await gpud.deleted(instance)
    kernel.mend(f"devices/{GPU}/reset")
    domains_of, asked, late = gpud.cleaner.domains_of, 0, asyncio.Event()

    async def late_for_the_second(functions: Collection[PciAddress]) -> dict[PciAddress, str]:
        nonlocal asked
        asked += 1
        if asked > 1:
            await late.wait()
        return await domains_of(functions)

    monkeypatch.setattr(gpud.cleaner, "domains_of", late_for_the_second)
    first, second = (asyncio.create_task(gpud.cleaner.release(GPU)) for _ in range(2))
    assert await first
    monkeypatch.setattr(gpud.cleaner, "domains_of", domains_of)
    await gpud.inventory.refresh()
    instance = await gpud.running("sold again")
    resets = list(kernel.resets)
    late.set()
    assert not await second
    assert kernel.resets == resets
    assert kernel.driver(instance.grant.gpus[0].address) == "vfio-pci"


async def test_what_no_step_foresaw_is_tried_again(
    gpud: Gpud, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = gpud.cleaner.take

    async def breaks_once(_functions: Collection[PciAddress]) -> None:
        monkeypatch.setattr(gpud.cleaner, "take", take)
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(gpud.cleaner, "take", breaks_once)
    await gpud.deleted(await gpud.running())
    assert set(drivers(kernel).values()) == AS_FOUND
    assert quarantines(gpud) == {}


async def test_a_card_pulled_from_a_booting_guest_fails_the_order(
    gpud: Gpud, kernel: FakeKernel, libvirtd: LibvirtDaemon
) -> None:
    libvirtd.on_start = lambda _guest: None
    instance = await gpud.reach(await gpud.order(), Step.AWAIT_READY)
    kernel.pull(GPU)
    assert str(GPU) in await why_it_failed(gpud, instance)


async def test_an_operators_quarantine_keeps_a_card_from_the_next_instance_only(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    instance = await gpud.running()
    await gpud.store.quarantine(GPU, "fans rattle")
    await gpud.store.quarantine(GPU, "fans rattle")
    await gpud.inventory.refresh()
    assert (await gpud.reach(instance, Step.RUNNING)).status is Status.RUNNING
    await gpud.deleted(instance)
    assert quarantines(gpud) == {GPU: "fans rattle"}
    assert await sellable(gpud) == [OTHER]
    assert kernel.resets == [(GPU, "flr")] * 2
    assert kernel.driver(GPU) == "nvidia"
    assert await gpud.cleaner.release(GPU)
    assert await sellable(gpud) == [GPU, OTHER]


async def test_a_card_that_an_instance_has_is_not_released(gpud: Gpud) -> None:
    instance = await gpud.running()
    await gpud.store.quarantine(OTHER, "fans rattle")
    assert await gpud.cleaner.release(OTHER)
    await gpud.store.quarantine(GPU, "fans rattle")
    with pytest.raises(GpudError, match=instance.upstream_id):
        await gpud.cleaner.release(GPU)
    assert GPU in quarantines(gpud)


async def test_a_card_quarantined_after_admission_is_not_handed_over(
    start_gpud: StartGpud, kernel: FakeKernel
) -> None:
    hold = Hold(Step.CHECK_GPUS, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    await hold.reached.wait()
    await gpud.store.quarantine(GPU, "fans rattle")
    hold.open.set()
    assert "fans rattle" in await why_it_failed(gpud, instance)
    assert kernel.writes == []


PET = """<domain type='kvm'><name>pet</name><uuid>9d6a7c4e-58f0-5d1c-9a51-3c1f3c1f3c1f</uuid>
<devices><hostdev mode='subsystem' type='pci' managed='no'><source>
<address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source></hostdev></devices></domain>"""


async def test_a_card_that_somebody_elses_domain_has_is_left_alone(
    gpud: Gpud, kernel: FakeKernel, libvirtd: LibvirtDaemon
) -> None:
    libvirtd.add(Guest(libvirtd, PET))
    assert "domain pet" in await why_it_failed(gpud, await gpud.order())
    assert kernel.writes == []


@pytest.mark.parametrize("step", [Step.BIND_GPUS, Step.CLEAN_GPUS])
async def test_a_card_that_somebody_elses_domain_took_meanwhile_is_not_reset(
    start_gpud: StartGpud, kernel: FakeKernel, libvirtd: LibvirtDaemon, step: Step
) -> None:
    hold = Hold(step, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    if step is Step.CLEAN_GPUS:
        await gpud.reach(instance, Step.RUNNING)
        await gpud.store.request_delete(instance.upstream_id)
    await hold.reached.wait()
    resets = list(kernel.resets)
    libvirtd.add(Guest(libvirtd, PET))
    hold.open.set()
    await gpud.ended(instance)
    assert kernel.resets == resets
    assert "domain pet" in quarantines(gpud)[GPU]
    with pytest.raises(GpudError, match="domain pet"):
        await gpud.cleaner.release(GPU)


async def test_a_card_that_was_pulled_out_and_put_back_between_two_looks_is_missed(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    instance = await gpud.running()
    libvirtd.guests[instance.domain_uuid].unplug("0x01:0x00.0x0")
    gpud.worker.wake(instance.upstream_id)
    assert "no longer: 0000:01:00.0" in await why_it_failed(gpud, instance)


async def test_a_start_that_comes_through_behind_the_stop_is_ended_before_its_card_is_reset(
    start_gpud: StartGpud, kernel: FakeKernel, libvirtd: LibvirtDaemon
) -> None:
    hold = Hold(Step.CLEAN_GPUS, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.running()
    guest = libvirtd.guests[instance.domain_uuid]
    await gpud.store.request_delete(instance.upstream_id)
    await hold.reached.wait()
    assert not libvirtd.guests
    libvirtd.add(guest)
    hold.open.set()
    await gpud.ended(instance)
    assert not libvirtd.guests
    assert len(kernel.resets) == 2
    assert quarantines(gpud) == {}


def freezing(write: Write) -> Write:
    """A server that stands still as soon as anything is reset."""

    async def frozen(file: Path, text: str, timeout_s: float) -> None:
        if file.name == "reset":
            await asyncio.Event().wait()
        await write(file, text, timeout_s)

    return frozen


async def test_a_reset_that_takes_the_server_down_is_not_repeated(
    start_gpud: StartGpud,
    kernel: FakeKernel,
    libvirtd: LibvirtDaemon,
    state_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpud = await start_gpud()
    instance = await gpud.running()
    await gpud.store.request_delete(instance.upstream_id)
    monkeypatch.setattr(kernel, "write", freezing(kernel.write))
    await until(lambda: GPU in gpud.store.resets_begun)
    await gpud.kill()
    libvirtd.guests.clear()
    kernel = make_server(state_dir / "host-after-power-cycle")

    gpud = await start_gpud(server=kernel)
    await gpud.ended(instance)
    assert kernel.resets == []
    assert "went down" in quarantines(gpud)[GPU]
    assert await gpud.cleaner.release(GPU)
    assert await sellable(gpud) == [GPU, OTHER]


async def test_a_server_reset_while_a_guest_ends_leaves_no_card_uncleaned(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, state_dir: Path
) -> None:
    hold = Hold(Step.CLEAN_GPUS, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.running()
    await gpud.store.request_delete(instance.upstream_id)
    await hold.reached.wait()
    await gpud.kill()
    libvirtd.guests.clear()
    kernel = make_server(state_dir / "host-after-reset")

    gpud = await start_gpud(server=kernel)
    await gpud.ended(instance)
    assert kernel.resets == [(GPU, "flr")]
    assert set(drivers(kernel).values()) == AS_FOUND


async def test_a_gpu_that_only_changes_its_power_state_is_not_reset(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    kernel.pull(GPU)
    kernel.add_function(GPU, driver="nvidia", group=1, reset_methods=("pm",))
    await gpud.inventory.refresh()
    assert "proves nothing" in await why_it_failed(gpud, await gpud.order())
    assert resets_counted(gpud, "pm", "unproven") > 0


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
        (("0", "mig 1 1"), "switched MIG on"),
        (("0", "ecc 1 0"), "changed the ECC mode"),
        (IDLE, None),
    ],
)
async def test_what_nvml_tells_of_a_card_after_a_guest_decides_whether_it_is_sold(
    start_gpud: StartGpud,
    nvml_on: NvmlOn,
    told: tuple[str, str],
    why: str | None,
) -> None:
    all_idle = "".join(NVML_OF.format(gpu, *IDLE) for gpu in (GPU, OTHER))
    gpud = await start_gpud(nvml=nvml_on(all_idle))
    assert await sellable(gpud) == [GPU, OTHER]
    instance = await gpud.running()
    nvml_on(NVML_OF.format(GPU, *told) + NVML_OF.format(OTHER, *IDLE))
    await gpud.deleted(instance)
    assert OTHER not in quarantines(gpud)
    if why is None:
        assert GPU not in quarantines(gpud)
        return
    assert why in quarantines(gpud)[GPU]
    with pytest.raises(GpudError, match=why):
        await gpud.cleaner.release(GPU)
    nvml_on(all_idle)
    assert await gpud.cleaner.release(GPU)
    assert await sellable(gpud) == [GPU, OTHER]


@pytest.mark.real_command(Path(sys.executable).name)
async def test_a_card_that_nvml_does_not_see_after_its_guest_is_quarantined(
    start_gpud: StartGpud, nvml_on: NvmlOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "_ASK_AGAIN_S", 0)
    all_idle = "".join(NVML_OF.format(gpu, *IDLE) for gpu in (GPU, OTHER))
    gpud = await start_gpud(nvml=nvml_on(all_idle))
    instance = await gpud.running()
    nvml_on(NVML_OF.format(OTHER, *IDLE))
    await gpud.deleted(instance)
    assert "NVML does not see it" in quarantines(gpud)[GPU]


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
