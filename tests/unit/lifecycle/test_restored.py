"""gpud on a state from a backup: what that does not know is shown, and left until the operator speaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpud.backup import back_up, restore
from gpud.errors import Code, GpudError
from gpud.lifecycle.steps import lease_name
from gpud.model import DOMAIN_PREFIX, Instance, Status
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Gpud


class LastNight:
    """A gpud whose state is of last night, with a guest of then and one of this morning."""

    gpud: Gpud
    known: Instance
    unknown: Instance


@pytest.fixture
async def last_night(start_gpud: StartGpud, tmp_path: Path) -> LastNight:
    scene = LastNight()
    gpud = await start_gpud()
    scene.known = await gpud.running("yesterday")
    back_up(gpud.config.state_dir, tmp_path / "backup")
    scene.unknown = await gpud.running("this-morning")
    gpud.consoles.append(scene.unknown.upstream_id, b"login:")
    await gpud.stop()
    restore(gpud.config.state_dir, tmp_path / "backup")
    scene.gpud = await start_gpud()
    return scene


@pytest.mark.leaves_a_mess
async def test_a_guest_ordered_after_the_backup_keeps_running_with_all_that_is_its(
    last_night: LastNight, libvirtd: LibvirtDaemon
) -> None:
    gpud, unknown = last_night.gpud, last_night.unknown
    both = {last_night.known.upstream_id, unknown.upstream_id}
    for _ in range(2):
        await gpud.reconciler.once()
    assert set(libvirtd.guests) == {last_night.known.domain_uuid, unknown.domain_uuid}
    assert gpud.directories() == both
    leases = {lease_name(one, gpud.store.owner) for one in both}
    assert set(libvirtd.networks["gpud"].hosts()) == leases
    assert unknown.upstream_id in gpud.consoles.kept()
    (event,) = await gpud.store.events(unknown.upstream_id)
    assert (event.was, event.became) == ("orphan", "left alone")
    assert f"domain {DOMAIN_PREFIX}{unknown.upstream_id} has no instance" in event.why


async def test_what_is_unknown_goes_when_the_operator_says_so_and_from_then_on(
    last_night: LastNight, libvirtd: LibvirtDaemon
) -> None:
    gpud, known = last_night.gpud, last_night.known
    await gpud.reconciler.once()
    await gpud.reconciler.once(repair=True)
    assert set(libvirtd.guests) == {known.domain_uuid}
    assert gpud.directories() == {known.upstream_id}
    assert set(libvirtd.networks["gpud"].hosts()) == {
        lease_name(known.upstream_id, gpud.store.owner)
    }
    assert gpud.consoles.kept() <= {known.upstream_id}
    assert not gpud.store.restored
    (gpud.config.state_dir / "instances" / "i-00000000000000aa").mkdir()
    await gpud.reconciler.once()
    assert gpud.directories() == {known.upstream_id}


async def test_repairing_a_state_that_is_not_from_a_backup_is_reconciling(
    gpud: Gpud,
) -> None:
    (gpud.config.state_dir / "instances" / "i-00000000000000aa").mkdir(parents=True)
    await gpud.reconciler.once(repair=True)
    assert gpud.directories() == set()
    assert [event.became for event in await gpud.store.events()] == ["removed"]


async def test_nothing_is_sold_until_then_but_a_repeat_is_still_the_same_instance(
    last_night: LastNight,
) -> None:
    gpud, known = last_night.gpud, last_night.known
    for instance_id in ("next", "this-morning"):
        with pytest.raises(GpudError, match="from a backup") as caught:
            await gpud.order(instance_id)
        assert caught.value.code is Code.NO_CAPACITY
    assert (await gpud.order("yesterday")).upstream_id == known.upstream_id
    version = gpud.store.version
    await gpud.reconciler.once(repair=True)
    assert gpud.store.version > version
    assert (await gpud.running("next")).status is Status.RUNNING


@pytest.mark.leaves_a_mess
async def test_the_gpu_of_a_guest_that_is_unknown_is_not_handed_over_to_another(
    last_night: LastNight, libvirtd: LibvirtDaemon
) -> None:
    gpud, unknown = last_night.gpud, last_night.unknown
    await gpud.store.trust()
    refused = await gpud.ended(await gpud.order("next"))
    assert refused.grant.gpus == unknown.grant.gpus
    assert refused.status is Status.ERROR
    whys = [event.why for event in await gpud.store.events(refused.upstream_id)]
    gpu = unknown.grant.gpus[0].address
    assert f"{gpu} is in use by domain {unknown.domain_name}" in whys
    assert unknown.domain_uuid in libvirtd.guests
    assert libvirtd.guests[unknown.domain_uuid].name == unknown.domain_name
