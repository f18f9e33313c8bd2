"""Orders from admission to the end, including their rarer ways.

What a fault in each single step does to them is in ``tests/chaos/test_every_step.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gpud import command
from gpud.errors import Code, GpudError
from gpud.guest.image import ImageStore
from gpud.hypervisor.domainxml import CHANNEL_NAME
from gpud.model import Status, Step
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon, error
from tests.unit.fakes.orders import Clock, until
from tests.unit.fakes.qemu_img import QemuImg, failed
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Gpud, Hold, nothing_left, one_domain

REAL_RUN = command.run


async def test_an_order_runs_and_leaves_nothing_behind(gpud: Gpud, libvirtd: LibvirtDaemon) -> None:
    instance = await gpud.running()
    assert (instance.status, instance.guest_boots) == (Status.RUNNING, 1)
    assert one_domain(libvirtd, instance)
    assert gpud.directories() == {instance.upstream_id}
    ended = await gpud.deleted(instance)
    assert (ended.status, ended.step) == (Status.TERMINATED, Step.ENDED)
    assert nothing_left(gpud, libvirtd)


@pytest.mark.real_command("qemu-img")
async def test_an_order_runs_on_a_real_overlay(
    gpud: Gpud, libvirtd: LibvirtDaemon, monkeypatch: pytest.MonkeyPatch, state_dir: Path
) -> None:
    monkeypatch.setattr(command, "run", REAL_RUN)
    source = state_dir / "real.qcow2"
    await command.run("qemu-img", "create", "-f", "qcow2", source, "2M", timeout_s=10)
    await ImageStore(state_dir / "images").add(source, "base")
    instance = await gpud.running()
    assert one_domain(libvirtd, instance)
    await gpud.deleted(instance)
    assert nothing_left(gpud, libvirtd)


async def test_two_orders_run_side_by_side_and_the_third_has_no_gpu(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    first, second = await gpud.running("a"), await gpud.running("b")
    with pytest.raises(GpudError) as caught:
        await gpud.order("c")
    assert caught.value.code is Code.NO_CAPACITY
    await gpud.deleted(first)
    third = await gpud.running("c")
    assert set(libvirtd.guests) == {second.domain_uuid, third.domain_uuid}
    assert third.grant.gpus == first.grant.gpus


async def test_an_order_whose_network_cannot_be_made_gives_its_gpu_back(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    libvirtd.fault("networkCreate", error("subnet is already in use by interface eth0"), times=99)
    instance = await gpud.order()
    await until(lambda: "networkCreate" in libvirtd.calls)
    await until(lambda: not gpud.store.live)
    assert instance.upstream_id not in gpud.store.live


# -- the daemon's death and its orderly stop --------------------------------------------------------


async def test_a_guest_that_became_ready_while_the_daemon_was_away_is_running(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon
) -> None:
    libvirtd.on_start = lambda _guest: None
    gpud = await start_gpud()
    instance = await gpud.reach(await gpud.order(), Step.AWAIT_READY)
    guest = libvirtd.guests[instance.domain_uuid]
    await until(lambda: guest.channels[CHANNEL_NAME].stream)
    await gpud.kill()
    guest.boots()
    gpud = await start_gpud()
    assert (await gpud.reach(instance, Step.RUNNING)).status is Status.RUNNING


async def test_a_report_that_was_read_and_not_yet_recorded_survives_a_crash(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    async def dies(_upstream_id: str, boot_id: str) -> None:
        read.append(boot_id)
        raise OSError("killed")

    gpud = await start_gpud()
    monkeypatch.setattr(gpud.store, "guest_booted", dies)
    instance = await gpud.order()
    await until(lambda: read)
    await gpud.kill()
    gpud = await start_gpud()
    # Guests say it again and again.
    libvirtd.guests[instance.domain_uuid].reports(f"gpud1 started {read[0]}\n".encode())
    await until(lambda: gpud.store.live[instance.upstream_id].step is Step.RUNNING)


async def test_an_orderly_stop_leaves_guests_running(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon
) -> None:
    gpud = await start_gpud()
    instance = await gpud.running()
    await gpud.stop()
    assert one_domain(libvirtd, instance)
    gpud = await start_gpud()
    await gpud.reconciler.once()
    assert one_domain(libvirtd, instance)
    assert gpud.store.live[instance.upstream_id].status is Status.RUNNING


# -- faults ----------------------------------------------------------------------------------------


async def test_a_disk_that_cannot_be_made_fails_the_order(
    gpud: Gpud, libvirtd: LibvirtDaemon, qemu_img: QemuImg
) -> None:
    qemu_img.faults.append(failed())
    ended = await gpud.ended(await gpud.order())
    assert ended.failure == "its disk could not be made (host_command_failed)"
    assert nothing_left(gpud, libvirtd)


async def test_a_running_instance_stays_running_while_libvirt_is_away_for_days(
    gpud: Gpud, libvirtd: LibvirtDaemon, clock: Clock, monotonic: Clock
) -> None:
    instance = await gpud.running()
    libvirtd.stop()
    await until(lambda: not gpud.hypervisor.available)
    for _ in range(5):
        clock.advance(86400)
        monotonic.advance(86400)
        gpud.worker.wake_all()
        await until(lambda: gpud.worker._wakes[instance.upstream_id].is_set() is False)
    assert gpud.store.live[instance.upstream_id].status is Status.RUNNING
    libvirtd.start()
    await gpud.hypervisor.wait_available()
    assert one_domain(libvirtd, instance)


async def test_a_start_that_hangs_holds_up_its_own_order_alone(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    with libvirtd.hanging("createXML") as hang:
        stuck = await gpud.order("stuck")
        await until(hang.reached.is_set)
        libvirtd.heal()
        other = await gpud.running("other")
        assert one_domain(libvirtd, other)
        await gpud.store.request_delete(stuck.upstream_id)
    assert (await gpud.ended(stuck)).status is Status.TERMINATED
    assert one_domain(libvirtd, other)


async def test_a_strange_domain_in_its_place_fails_the_order_and_is_left(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon
) -> None:
    hold = Hold(Step.START_DOMAIN, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    await hold.reached.wait()
    libvirtd.begin(f"<domain type='kvm'><name>{instance.domain_name}</name></domain>")
    hold.open.set()
    ended = await gpud.ended(instance)
    assert (ended.status, len(libvirtd.guests)) == (Status.ERROR, 1)


# -- guests that end by themselves -----------------------------------------------------------------


async def test_a_guest_that_powers_off_comes_up_again_and_too_many_times_in_a_row_is_an_error(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, clock: Clock
) -> None:
    gpud = await start_gpud(max_restarts=2)
    instance = await gpud.running()

    async def power_off() -> None:
        boots = gpud.store.live[instance.upstream_id].guest_boots
        libvirtd.guests[instance.domain_uuid].powers_off()

        def up_again_or_gone() -> bool:
            gpud.worker.wake_all()
            found = gpud.store.live.get(instance.upstream_id)
            return found is None or (found.guest_boots > boots and found.step is Step.RUNNING)

        await until(up_again_or_gone)

    await power_off()
    await power_off()
    assert gpud.store.live[instance.upstream_id].restarts == 2
    clock.advance(3600)  # a quiet hour
    await power_off()
    assert gpud.store.live[instance.upstream_id].restarts == 1
    await power_off()
    assert gpud.store.live[instance.upstream_id].status is Status.RUNNING
    await power_off()
    ended = await gpud.store.find(instance.upstream_id)
    assert ended is not None
    assert (ended.status, ended.failure) == (
        Status.ERROR,
        "its guest ended by itself 3 times in a row",
    )
    assert nothing_left(gpud, libvirtd)


async def test_a_guest_that_powers_off_is_terminated_where_the_config_says_so(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon
) -> None:
    gpud = await start_gpud(on_poweroff="terminate")
    instance = await gpud.running()
    libvirtd.guests[instance.domain_uuid].powers_off()
    assert (await gpud.ended(instance)).status is Status.TERMINATED
    assert nothing_left(gpud, libvirtd)


async def test_a_guest_that_has_run_is_never_given_up(
    gpud: Gpud, libvirtd: LibvirtDaemon, monotonic: Clock
) -> None:
    """Its disk is the tenant's work: it waits for the host to be mended."""
    instance = await gpud.running()
    libvirtd.fault("createXML", error("no firmware"), times=3)
    libvirtd.guests[instance.domain_uuid].powers_off()
    await until(lambda: libvirtd.calls.count("createXML") >= 2)
    monotonic.advance(100_000)
    await until(lambda: libvirtd.calls.count("createXML") >= 5)
    await until(lambda: gpud.store.live[instance.upstream_id].step is Step.RUNNING)
    assert gpud.store.live[instance.upstream_id].status is Status.RUNNING
    assert gpud.directories() == {instance.upstream_id}


async def test_a_guest_that_never_reports_is_given_up_at_the_deadline(
    gpud: Gpud, libvirtd: LibvirtDaemon, monotonic: Clock
) -> None:
    libvirtd.on_start = lambda _guest: None
    instance = await gpud.reach(await gpud.order(), Step.AWAIT_READY)
    await until(lambda: libvirtd.guests[instance.domain_uuid].channels[CHANNEL_NAME].stream)
    monotonic.advance(899)
    gpud.worker.wake_all()
    await until(lambda: not gpud.worker._wakes[instance.upstream_id].is_set())
    assert gpud.store.live[instance.upstream_id].status is Status.CREATING
    monotonic.advance(2)
    ended = await gpud.ended(instance)
    assert ended.failure is not None
    assert "within 900 s" in ended.failure
    assert nothing_left(gpud, libvirtd)
