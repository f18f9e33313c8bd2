"""Each step: from an instance to an outcome, and the same again when it is run again."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from gpud.errors import Code, GpudError
from gpud.guest.disk import InstanceFiles
from gpud.hypervisor.domainxml import CHANNEL_NAME
from gpud.hypervisor.events import DomainEvent
from gpud.hypervisor.passthroughxml import passed_functions
from gpud.lifecycle import steps as steps_module
from gpud.lifecycle.outcome import Fail, Hop, Nap, Outcome
from gpud.lifecycle.steps import lease_name
from gpud.model import Instance, PciAddress, Status, Step
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import Clock, until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import ADDRESSES, CREATE_STEPS, RELEASE_STEPS, Gpud

QUIET = 3601
"""Seconds after which a guest's end is no longer one of a row."""


@pytest.fixture
async def still(start_gpud: StartGpud) -> Gpud:
    """A gpud whose worker drives nothing: steps are run by hand."""
    gpud = await start_gpud()
    await gpud.worker.close()
    return gpud


@pytest.fixture
async def instance(still: Gpud) -> Instance:
    return await still.order()


async def run(gpud: Gpud, instance: Instance, *steps: Step) -> Outcome:
    """Run steps, each twice as after a crash; give the last one's outcome."""
    outcome: Outcome = Nap(0)
    for step in steps:
        first = await gpud.steps.functions()[step](instance)
        outcome = await gpud.steps.functions()[step](instance)
        assert outcome == first
    return outcome


TO_START = CREATE_STEPS[: CREATE_STEPS.index(Step.START_DOMAIN) + 1]


def test_every_step_but_the_last_has_a_function_of_its_name(still: Gpud) -> None:
    functions = still.steps.functions()
    assert {step: act.__name__ for step, act in functions.items()} == {
        step: step.value for step in Step if step is not Step.ENDED
    }


async def test_lease_address_pins_it_in_a_network_that_runs(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon
) -> None:
    assert await run(still, instance, Step.LEASE_ADDRESS) == Hop(Step.CLONE_DISK)
    network = libvirtd.networks["gpud"]
    name = lease_name(instance.upstream_id, still.store.owner)
    assert network.hosts() == {name: str(ADDRESSES[0])}
    assert network.autostart


async def test_an_instance_without_address_needs_no_network(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon
) -> None:
    bare = replace(instance, grant=replace(instance.grant, address=None))
    assert await run(still, bare, Step.LEASE_ADDRESS) == Hop(Step.CLONE_DISK)
    assert await run(still, bare, Step.RETURN_ADDRESS) == Hop(Step.CLEAN_GPUS)
    assert libvirtd.networks == {}


async def test_clone_disk_makes_an_overlay_of_the_granted_image(
    still: Gpud, instance: Instance
) -> None:
    assert await run(still, instance, Step.CLONE_DISK) == Hop(Step.WRITE_SEED)
    files = InstanceFiles.of(still.config.state_dir, instance.upstream_id)
    assert files.disk.exists()
    assert files.base.samefile(still.images.resolve(instance.grant.image_digest).path)


async def test_clone_disk_without_its_image_is_final(still: Gpud, instance: Instance) -> None:
    gone = replace(instance, grant=replace(instance.grant, image_digest="sha256:" + "1" * 64))
    with pytest.raises(GpudError) as caught:
        await still.steps.clone_disk(gone)
    assert caught.value.code is Code.IMAGE_INVALID
    assert not caught.value.transient


async def test_write_seed_carries_the_script(still: Gpud) -> None:
    script = b"#!/bin/sh\r\necho \xff\n"
    instance = await still.order("with-script", script)
    hop = await run(still, instance, Step.CLONE_DISK, Step.WRITE_SEED)
    assert hop == Hop(Step.CHECK_GPUS)
    seed = InstanceFiles.of(still.config.state_dir, instance.upstream_id).seed.read_bytes()
    assert script in seed


async def test_start_domain_starts_one_domain_that_is_marked_as_ours(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon, clock: Clock
) -> None:
    booted = replace(instance, guest_boots=3)
    hop = await run(still, booted, *TO_START)
    changes = {"last_start_at": clock.now, "boots_at_start": 3}
    assert hop == Hop(Step.AWAIT_READY, changes=changes)
    assert libvirtd.calls.count("createXML") == 1
    [domain] = await still.hypervisor.domains()
    assert (domain.uuid, domain.name) == (instance.domain_uuid, instance.domain_name)
    assert domain.identity is not None
    assert domain.identity.owner == still.store.owner
    assert domain.identity.upstream_id == instance.upstream_id


async def test_the_domain_has_what_was_granted(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon
) -> None:
    await run(still, instance, *TO_START)
    xml = libvirtd.guests[instance.domain_uuid].xml
    shape = instance.grant.shape
    assert (xml.findtext("memory"), xml.findtext("vcpu")) == (
        str(shape.memory_mib),
        str(shape.cpu_cores),
    )
    files = InstanceFiles.of(still.config.state_dir, instance.upstream_id)
    sources = [one.get("file") for one in xml.iterfind("devices/disk/source")]
    assert sources == [str(files.disk), str(files.seed)]
    passed = {PciAddress.parse(f"0000:01:00.{number}") for number in (0, 1)}
    assert set(passed_functions(ET.tostring(xml, encoding="unicode"))) == passed
    nic = xml.find("devices/interface")
    assert nic is not None
    assert nic.find("source[@network='gpud']") is not None
    assert nic.find(f"mac[@address='{instance.mac}']") is not None
    assert list(libvirtd.guests[instance.domain_uuid].channels) == [CHANNEL_NAME]


@pytest.mark.parametrize("best", ["kvm", "qemu"])
async def test_the_domain_type_is_the_best_there_is(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon, best: str
) -> None:
    libvirtd.best_type = best
    await run(still, instance, *TO_START)
    assert libvirtd.guests[instance.domain_uuid].xml.get("type") == best


async def test_the_domain_type_is_as_configured(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon
) -> None:
    gpud = await start_gpud(mode="user", domain_type="qemu")
    await gpud.worker.close()
    instance = await gpud.order()
    await run(gpud, instance, *TO_START)
    xml = libvirtd.guests[instance.domain_uuid].xml
    assert xml.get("type") == "qemu"
    assert xml.find("devices/interface[@type='user']") is not None
    assert "getCapabilities" not in libvirtd.calls


# -- await_ready -----------------------------------------------------------------------------------


async def test_await_ready_waits_for_a_guest_that_is_silent(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon
) -> None:
    libvirtd.on_start = lambda _guest: None
    await run(still, instance, *TO_START)
    assert isinstance(await run(still, instance, Step.AWAIT_READY), Nap)


async def test_a_report_makes_it_running_and_its_time_is_measured(
    still: Gpud, instance: Instance, clock: Clock
) -> None:
    clock.advance(42)
    ready = replace(instance, guest_boots=1)
    outcome = await still.steps.await_ready(ready)
    changes = {"status": Status.RUNNING, "running_at": clock.now}
    assert outcome == Hop(Step.RUNNING, changes=changes)
    total = still.metrics.registry.get_sample_value(
        "gpud_order_to_running_seconds_sum", {"gpu_type": "h100_sxm"}
    )
    assert total == 42


async def test_a_clock_stepped_back_is_no_negative_time(
    still: Gpud, instance: Instance, clock: Clock
) -> None:
    clock.advance(-500)
    await still.steps.await_ready(replace(instance, guest_boots=1))
    total = still.metrics.registry.get_sample_value(
        "gpud_order_to_running_seconds_sum", {"gpu_type": "h100_sxm"}
    )
    assert total == 0


async def test_a_report_from_before_the_start_does_not_count(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon
) -> None:
    libvirtd.on_start = lambda _guest: None
    await run(still, instance, *TO_START)
    restarted = replace(instance, guest_boots=2, boots_at_start=2)
    assert isinstance(await run(still, restarted, Step.AWAIT_READY), Nap)


async def test_a_guest_that_is_up_again_keeps_when_it_first_ran(
    still: Gpud, instance: Instance
) -> None:
    again = replace(instance, guest_boots=2, boots_at_start=1, running_at=5.0)
    assert await run(still, again, Step.AWAIT_READY) == Hop(Step.RUNNING, "the guest is up again")


async def test_a_guest_that_ended_while_it_booted_is_started_again(
    still: Gpud, instance: Instance, clock: Clock
) -> None:
    outcome = await run(still, replace(instance, last_start_at=clock.now - 5), Step.AWAIT_READY)
    assert outcome == Hop(Step.CHECK_GPUS, "the guest had ended by itself", {"restarts": 1})


# -- running ---------------------------------------------------------------------------------------


async def test_a_guest_that_runs_is_left_alone_and_listened_to(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon
) -> None:
    await run(still, instance, *TO_START)
    assert isinstance(await run(still, instance, Step.RUNNING), Nap)
    guest = libvirtd.guests[instance.domain_uuid]
    await until(lambda: guest.console.stream and guest.channels[CHANNEL_NAME].stream)


@pytest.mark.parametrize(
    ("restarts", "last_start_s_ago", "expected"),
    [(0, 10, 1), (2, 10, 3), (2, QUIET, 1), (9, QUIET, 1), (0, None, 1), (2, -3600, 3)],
)
async def test_a_guest_that_ended_is_started_again_and_ends_in_a_row_are_counted(
    still: Gpud,
    instance: Instance,
    clock: Clock,
    restarts: int,
    last_start_s_ago: float | None,
    expected: int,
) -> None:
    last = None if last_start_s_ago is None else clock.now - last_start_s_ago
    gone = replace(instance, restarts=restarts, last_start_at=last)
    outcome = await run(still, gone, Step.RUNNING)
    assert outcome == Hop(Step.CHECK_GPUS, "the guest had ended by itself", {"restarts": expected})
    assert still.metrics.registry.get_sample_value("gpud_guest_restarts_total") == 2


@pytest.mark.parametrize(("max_restarts", "restarts"), [(10, 10), (0, 0)])
async def test_a_guest_that_ends_too_often_in_a_row_is_given_up(
    start_gpud: StartGpud, clock: Clock, max_restarts: int, restarts: int
) -> None:
    gpud = await start_gpud(max_restarts=max_restarts)
    await gpud.worker.close()
    gone = replace(await gpud.order(), restarts=restarts, last_start_at=clock.now)
    outcome = await run(gpud, gone, Step.RUNNING)
    assert outcome == Fail(f"its guest ended by itself {restarts + 1} times in a row")
    rested = replace(gone, last_start_at=clock.now - QUIET)
    assert isinstance(await run(gpud, rested, Step.RUNNING), Hop if max_restarts else Fail)


async def test_a_guest_that_ended_is_terminated_where_the_config_says_so(
    start_gpud: StartGpud,
) -> None:
    gpud = await start_gpud(on_poweroff="terminate")
    await gpud.worker.close()
    instance = await gpud.order()
    gpud.guests.hear(instance.domain_uuid, DomainEvent.STOPPED, "shutdown")
    outcome = await run(gpud, instance, Step.RUNNING)
    changes = {"status": Status.STOPPING}
    assert outcome == Hop(Step.STOP_DOMAIN, "the guest powered itself off", changes)


@pytest.mark.parametrize(
    ("event", "detail"),
    [(DomainEvent.STOPPED, "crashed"), (DomainEvent.SHUTDOWN, "guest"), (None, "")],
    ids=["QEMU crashed", "it only began to", "the host was rebooted"],
)
async def test_a_guest_that_did_not_power_off_is_started_again_wherever(
    start_gpud: StartGpud, event: DomainEvent | None, detail: str
) -> None:
    gpud = await start_gpud(on_poweroff="terminate")
    await gpud.worker.close()
    instance = await gpud.order()
    if event is not None:
        gpud.guests.hear(instance.domain_uuid, event, detail)
    outcome = await run(gpud, instance, Step.RUNNING)
    assert isinstance(outcome, Hop)
    assert outcome.step is Step.CHECK_GPUS


# -- giving back -----------------------------------------------------------------------------------


async def test_the_release_steps_undo_all_of_the_create_steps(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon
) -> None:
    await run(still, instance, *TO_START)
    still.guests.attach(instance)
    for step, following in zip(RELEASE_STEPS, [*RELEASE_STEPS[1:], Step.ENDED], strict=True):
        assert await run(still, instance, step) == Hop(following)
    assert libvirtd.guests == {}
    assert still.directories() == set()
    assert libvirtd.networks["gpud"].hosts() == {}


@pytest.mark.parametrize("done", range(len(TO_START)))
async def test_the_release_steps_cope_with_what_was_never_made(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon, done: int
) -> None:
    await run(still, instance, Step.LEASE_ADDRESS, *TO_START[1:done])
    assert await run(still, instance, *RELEASE_STEPS) == Hop(Step.ENDED)
    assert libvirtd.guests == {}
    assert still.directories() == set()


async def test_stop_domain_leaves_others_domains(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon
) -> None:
    await run(still, instance, *TO_START)
    other = libvirtd.begin("<domain type='kvm'><name>not-ours</name></domain>")
    await run(still, instance, Step.STOP_DOMAIN)
    assert list(libvirtd.guests.values()) == [other]


async def test_a_stop_whose_answer_is_lost_is_done_all_the_same_the_next_time(
    still: Gpud, instance: Instance, libvirtd: LibvirtDaemon
) -> None:
    await run(still, instance, *TO_START)
    libvirtd.fault("destroy", after=True)
    with pytest.raises(GpudError) as caught:
        await still.steps.stop_domain(instance)
    assert caught.value.transient
    assert await still.steps.stop_domain(instance) == Hop(Step.REMOVE_FILES)


def test_naps_are_short_enough_to_notice_a_lost_event() -> None:
    assert steps_module._READY_NAP_S <= 10
    assert steps_module._RUNNING_NAP_S <= 30
