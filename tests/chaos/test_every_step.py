"""An order with one fault in each step, or in each call of libvirt that it makes itself.

The daemon is killed, libvirtd is, the connection is lost, a DELETE comes, the step fails for good.

The steps are taken from the table of legal moves: a new one is covered without anyone thinking of it.
"""

from __future__ import annotations

from typing import Any

import pytest

from gpud.audit.facts import Finding
from gpud.errors import Code, GpudError
from gpud.model import Instance, Status, Step
from tests.faults import FaultLog
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import (
    CREATE_STEPS,
    LIVING_STEPS,
    MOMENTS,
    RELEASE_STEPS,
    Gpud,
    Hold,
    StepsMapping,
    nothing_left,
    one_domain,
)


async def found_after_the_end(
    gpud: Gpud, libvirtd: LibvirtDaemon, instance: Instance
) -> list[Finding]:
    """See an instance end as it was asked to, and what is wrong then."""
    assert (await gpud.ended(instance)).status is Status.TERMINATED
    assert nothing_left(gpud, libvirtd)
    return await gpud.findings()


@MOMENTS
@pytest.mark.parametrize("step", LIVING_STEPS)
async def test_delete_in_any_step_ends_with_nothing_left(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, step: Step, after: bool, fault_log: FaultLog
) -> None:
    hold = Hold(step, after=after)
    gpud = await start_gpud(hold)
    # Such a network exists from the first reconciliation on; without one there is nothing to return.
    await gpud.reconciler.once()
    instance = await gpud.order()
    await hold.reached.wait()
    deleted = await gpud.store.request_delete(instance.upstream_id)
    assert deleted is not None
    assert deleted.status is Status.STOPPING
    with fault_log.recovering("DELETE in any step") as findings:
        hold.open.set()
        ended = await gpud.ended(instance)
        assert ended.status is Status.TERMINATED
        assert nothing_left(gpud, libvirtd)
        if step is not Step.RUNNING:
            events = await gpud.store.events(instance.upstream_id)
            assert not [event for event in events if event.became.startswith("running")]
        findings.extend(await gpud.findings())


@MOMENTS
@pytest.mark.parametrize("step", LIVING_STEPS)
async def test_killed_in_any_create_step_the_order_still_runs(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, step: Step, after: bool, fault_log: FaultLog
) -> None:
    hold = Hold(step, after=after)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    await hold.reached.wait()
    await gpud.kill()

    with fault_log.recovering("killed in a step of creation") as findings:
        gpud = await start_gpud()
        await gpud.reconciler.once()
        running = await gpud.reach(instance, Step.RUNNING)
        assert (running.status, running.grant) == (Status.RUNNING, instance.grant)
        assert one_domain(libvirtd, instance)
        assert libvirtd.calls.count("createXML") == 1
        assert gpud.directories() == {instance.upstream_id}
        await gpud.deleted(running)
        assert nothing_left(gpud, libvirtd)
        findings.extend(await gpud.findings())


@MOMENTS
@pytest.mark.parametrize("step", RELEASE_STEPS)
async def test_killed_in_any_release_step_nothing_is_left(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, step: Step, after: bool, fault_log: FaultLog
) -> None:
    hold = Hold(step, after=after)
    gpud = await start_gpud(hold)
    instance = await gpud.running()
    await gpud.store.request_delete(instance.upstream_id)
    await hold.reached.wait()
    await gpud.kill()

    with fault_log.recovering("killed in a step of release") as findings:
        findings.extend(await found_after_the_end(await start_gpud(), libvirtd, instance))


@MOMENTS
@pytest.mark.parametrize("step", CREATE_STEPS)
async def test_a_delete_recorded_before_a_crash_is_kept_after_it(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, step: Step, after: bool, fault_log: FaultLog
) -> None:
    hold = Hold(step, after=after)
    gpud = await start_gpud(hold)
    await gpud.reconciler.once()
    instance = await gpud.order()
    await hold.reached.wait()
    await gpud.store.request_delete(instance.upstream_id)
    await gpud.kill()

    with fault_log.recovering("DELETE in a step, then killed in it") as findings:
        findings.extend(await found_after_the_end(await start_gpud(), libvirtd, instance))


class Breaking:
    """A step that does its work and then says that it failed for good."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __call__(self, functions: StepsMapping) -> StepsMapping:
        act = functions[self._step]

        async def broken(instance: Instance) -> Any:
            await act(instance)
            raise GpudError(Code.GUEST_FAILED, "it broke")

        return {**functions, self._step: broken}


@pytest.mark.parametrize("step", CREATE_STEPS)
async def test_an_order_that_fails_in_any_step_gives_everything_back(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, step: Step, fault_log: FaultLog
) -> None:
    gpud = await start_gpud(Breaking(step))
    with fault_log.recovering("a step of creation fails for good") as findings:
        ended = await gpud.ended(await gpud.order())
        assert ended.status is Status.ERROR
        assert ended.failure is not None
        assert nothing_left(gpud, libvirtd)
        findings.extend(await gpud.findings())
    assert len([await gpud.order(f"again-{number}") for number in range(2)]) == 2


@pytest.mark.parametrize("after", [False, True], ids=["not done", "done, but its answer lost"])
@pytest.mark.parametrize(
    "call",
    [
        "networkLookupByName",
        "networkDefineXML",
        "networkCreate",
        "networkUpdate",
        "getCapabilities",
        "createXML",
        "lookupByUUIDString",
        "destroy",
    ],
)
async def test_a_connection_lost_during_any_call_costs_a_retry_only(
    gpud: Gpud, libvirtd: LibvirtDaemon, call: str, after: bool, fault_log: FaultLog
) -> None:
    fault = libvirtd.fault(call, after=after)
    with fault_log.recovering("libvirt: connection lost in a call") as findings:
        instance = await gpud.running()
        assert one_domain(libvirtd, instance)
        await gpud.deleted(instance)
        assert fault.reached.is_set()
        assert nothing_left(gpud, libvirtd)
        findings.extend(await gpud.findings())


@pytest.mark.parametrize("step", LIVING_STEPS)
async def test_libvirtd_killed_during_any_step_and_restarted_the_order_still_runs(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, step: Step, fault_log: FaultLog
) -> None:
    hold = Hold(step, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    await hold.reached.wait()
    libvirtd.stop()
    await until(lambda: not gpud.hypervisor.available)
    with fault_log.recovering("libvirtd killed and restarted in any step") as findings:
        hold.open.set()
        libvirtd.start()
        running = await gpud.reach(instance, Step.RUNNING)
        assert running.status is Status.RUNNING
        await gpud.hypervisor.wait_available()
        assert one_domain(libvirtd, instance)
        await gpud.deleted(running)
        assert nothing_left(gpud, libvirtd)
        findings.extend(await gpud.findings())
