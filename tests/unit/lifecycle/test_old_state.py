"""Orders that the first gpud accepted are carried on by today's."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

from gpud.model import Instance, Status, Step
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.test_upgrade import FIRST

ITS_IMAGE = "sha256:" + "ab" * 32


async def test_live_instances_of_the_first_gpud_are_carried_on(
    state_dir: Path, start_gpud: StartGpud, image: str, libvirtd: LibvirtDaemon
) -> None:
    with closing(sqlite3.connect(state_dir / "state.sqlite")) as connection:
        connection.executescript(FIRST.read_text().replace(ITS_IMAGE, image))
    gpud = await start_gpud()
    live = {it.instance_id: it for it in gpud.store.live.values()}

    def found(instance_id: str) -> Instance:
        return live[instance_id]

    for instance_id in ("running", "creating"):
        await until(partial(libvirtd.guests.get, found(instance_id).domain_uuid))
        reached = await gpud.reach(found(instance_id), Step.RUNNING)
        assert reached.status is Status.RUNNING
    assert (await gpud.ended(found("stopping"))).status is Status.TERMINATED
    assert (await gpud.ended(found("failing"))).status is Status.ERROR
    await gpud.reconciler.once()
    for instance_id in ("running", "creating"):
        assert (await gpud.deleted(found(instance_id))).status is Status.TERMINATED
    assert libvirtd.guests == {}
