"""What healthz and readyz go by."""

from __future__ import annotations

import sqlite3
import threading

import pytest

from gpud.watch.health import Health
from tests.unit.service import config_from
from tests.unit.watch.conftest import Watched


async def test_all_well(watched: Watched) -> None:
    health = Health(watched.sources)
    assert await health.alive() == {}
    assert await health.ready() == {}


async def test_each_thing_that_keeps_it_from_selling_is_named(watched: Watched) -> None:
    watched.service.hypervisor.up = False
    watched.keys.ready = False
    watched.service.inventory.problem = "/sys cannot be read"
    health = Health(watched.sources)
    assert await health.alive() == {}, "a restart would mend none of it"
    ready = await health.ready()
    assert ready.keys() == {"libvirt", "keys", "host"}
    assert ready["host"] == "/sys cannot be read"


async def test_an_image_that_cannot_be_cloned_keeps_it_from_selling_and_a_drain_is_no_fault(
    watched: Watched,
) -> None:
    service = watched.service
    await service.store.drain(None, "maintenance")
    assert service.desk.closed() != []
    assert await Health(watched.sources).ready() == {}
    service.desk.reconfigure(config_from(service.config.state_dir, guest={"image": "gone"}))
    ready = await Health(watched.sources).ready()
    assert ready.keys() == {"image"}
    assert "the guest image cannot be used" in ready["image"]


async def test_a_record_that_hangs_is_not_alive(watched: Watched) -> None:
    go_on = threading.Event()
    watched.service.store._thread.submit(go_on.wait)
    health = Health(watched.sources, time_limit_s=0.01)
    try:
        assert await health.alive() == {"store": "did not answer within 0.01 s"}
        assert "store" in await health.ready()
    finally:
        go_on.set()


async def test_a_record_that_cannot_be_read_is_not_alive(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def execute(self, *_: object) -> None:
            raise sqlite3.DatabaseError("s3cret")

    monkeypatch.setattr(watched.service.store, "_connection", Broken())
    assert await Health(watched.sources).alive() == {"store": "cannot be read (DatabaseError)"}
    monkeypatch.undo()
