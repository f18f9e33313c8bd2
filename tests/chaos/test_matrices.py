"""Two blows at chosen places: a DELETE in one step and death in another; the server down in any step.

The steps come from the table of legal moves; single deaths in each are in ``test_every_step.py``.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest

from gpud.model import (
    FIRST_RELEASE_STEP,
    LEGAL_STEPS,
    Instance,
    Status,
    Step,
)
from tests.faults import FaultLog
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import (
    LIVING_STEPS,
    MOMENTS,
    RELEASE_STEPS,
    Gpud,
    Hold,
    StepsMapping,
    make_server,
    one_domain,
    way,
)

(FIRST_STEP_AGAIN,) = LEGAL_STEPS[Step.RUNNING] - {FIRST_RELEASE_STEP}
RESTART_STEPS = way(FIRST_STEP_AGAIN, Step.RUNNING)[:-1]
# Some of the pairs in a short run, all of them in a long one.
PAIRS = [(one, two) for one in LIVING_STEPS for two in RELEASE_STEPS]
if "CHAOS_CRASHES" not in os.environ:
    PAIRS = PAIRS[::4]


class Both:
    """Holds in two steps."""

    def __init__(self, first: Hold, second: Hold) -> None:
        self._first = first
        self._second = second

    def __call__(self, functions: StepsMapping) -> StepsMapping:
        return self._second(self._first(functions))


def cut_power(libvirtd: LibvirtDaemon, directory: Path) -> FakeKernel:
    """The server after a reboot: no guest runs, and every card is with its own driver."""
    libvirtd.guests.clear()
    for network in libvirtd.networks.values():
        network.live = copy.deepcopy(network.config) if network.autostart else None
    return make_server(directory)


async def ended_in_order(gpud: Gpud, instance: Instance) -> None:
    ended = await gpud.ended(instance)
    assert ended.status is Status.TERMINATED
    assert gpud.store.quarantines == {}


@MOMENTS
@pytest.mark.parametrize(("deleted_in", "killed_in"), PAIRS)
async def test_a_delete_in_one_step_and_death_in_a_later_one(
    start_gpud: StartGpud, fault_log: FaultLog, deleted_in: Step, killed_in: Step, after: bool
) -> None:
    create, release = Hold(deleted_in, after=False), Hold(killed_in, after=after)
    gpud = await start_gpud(Both(create, release))
    instance = await gpud.order()
    await create.reached.wait()
    await gpud.store.request_delete(instance.upstream_id)
    create.open.set()
    await release.reached.wait()
    await gpud.kill()
    with fault_log.recovering("DELETE in one step, killed in a later one") as findings:
        gpud = await start_gpud()
        await ended_in_order(gpud, instance)
        findings.extend(await gpud.findings())


@MOMENTS
@pytest.mark.parametrize("step", RESTART_STEPS)
async def test_killed_in_any_step_of_a_restart_the_guest_still_comes_up(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, fault_log: FaultLog, step: Step, after: bool
) -> None:
    hold = Hold(step, after=after)
    hold.open.set()
    gpud = await start_gpud(hold)
    instance = await gpud.running()
    hold.reached.clear()
    hold.open.clear()
    libvirtd.guests[instance.domain_uuid].powers_off()
    await hold.reached.wait()
    await gpud.kill()
    with fault_log.recovering("killed in a step of a restart") as findings:
        gpud = await start_gpud()
        again = await gpud.reach(instance, Step.RUNNING)
        assert (again.status, again.restarts, again.guest_boots) == (Status.RUNNING, 1, 2)
        assert again.running_at == instance.running_at
        assert one_domain(libvirtd, instance)
        findings.extend(await gpud.findings())


@MOMENTS
@pytest.mark.parametrize("step", [*LIVING_STEPS, *RELEASE_STEPS])
async def test_a_power_cut_in_any_step(
    start_gpud: StartGpud,
    libvirtd: LibvirtDaemon,
    state_dir: Path,
    fault_log: FaultLog,
    step: Step,
    after: bool,
) -> None:
    hold = Hold(step, after=after)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    if step in RELEASE_STEPS:
        instance = await gpud.reach(instance, Step.RUNNING)
        await gpud.store.request_delete(instance.upstream_id)
    await hold.reached.wait()
    await gpud.kill()
    server = cut_power(libvirtd, state_dir / "rebooted")
    with fault_log.recovering("power cut in any step") as findings:
        gpud = await start_gpud(server=server)
        if step in RELEASE_STEPS:
            await ended_in_order(gpud, instance)
        else:
            # By itself the record says nothing new: a guest that ran had the step already.
            await until(lambda: instance.domain_uuid in libvirtd.guests)
            again = await gpud.reach(instance, Step.RUNNING)
            assert again.status is Status.RUNNING
        findings.extend(await gpud.findings())


@MOMENTS
@pytest.mark.parametrize("step", LIVING_STEPS)
async def test_a_delete_in_any_step_and_then_a_power_cut(
    start_gpud: StartGpud,
    libvirtd: LibvirtDaemon,
    state_dir: Path,
    fault_log: FaultLog,
    step: Step,
    after: bool,
) -> None:
    hold = Hold(step, after=after)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    await hold.reached.wait()
    await gpud.store.request_delete(instance.upstream_id)
    await gpud.kill()
    server = cut_power(libvirtd, state_dir / "rebooted")
    with fault_log.recovering("DELETE in any step, then a power cut") as findings:
        gpud = await start_gpud(server=server)
        await ended_in_order(gpud, instance)
        findings.extend(await gpud.findings())
