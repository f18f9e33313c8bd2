"""Reconciling: what has our mark and no live instance goes, and nothing else does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import structlog.testing

from gpud.errors import Code, GpudError
from gpud.hypervisor.domains import Domain
from gpud.hypervisor.domainxml import METADATA_NAMESPACE
from gpud.lifecycle import reconcile as reconcile_module
from gpud.lifecycle.steps import lease_name
from gpud.model import DOMAIN_PREFIX, Instance, Status, Step
from gpud.store import Store
from tests.unit.fakes.libvirt_daemon import Guest, LibvirtDaemon, error
from tests.unit.fakes.orders import Clock, until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Gpud

ORPHAN = "i-00000000000000aa"
SECOND_ORPHAN = "i-00000000000000bb"


def begin(libvirtd: LibvirtDaemon, owner: str | None, upstream_id: str = ORPHAN) -> Guest:
    """Let a domain run that has a gpud's name, and that gpud's mark if an owner is given."""
    mark = (
        f"<metadata><g:instance xmlns:g='{METADATA_NAMESPACE}' owner='{owner}'"
        f" upstream_id='{upstream_id}'/></metadata>"
    )
    name = f"{DOMAIN_PREFIX}{upstream_id}"
    return libvirtd.begin(f"<domain type='kvm'><name>{name}</name>{mark if owner else ''}</domain>")


def orphans(gpud: Gpud, kind: str) -> float:
    name = "gpud_orphans_removed_total"
    return gpud.metrics.registry.get_sample_value(name, {"kind": kind}) or 0


def directory(gpud: Gpud, name: str = ORPHAN) -> Path:
    path = gpud.config.state_dir / "instances" / name
    path.mkdir(parents=True)
    return path


@contextmanager
def an_order_in_between(
    gpud: Gpud, monkeypatch: pytest.MonkeyPatch, upstream_id: str
) -> Iterator[None]:
    """Let an order with that id arrive after the domains were listed."""
    listed = gpud.hypervisor.domains

    async def list_and_order() -> list[Domain]:
        found = await listed()
        monkeypatch.setattr("secrets.token_hex", lambda _size: upstream_id.removeprefix("i-"))
        await gpud.order("in-between")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(gpud.hypervisor, "domains", list_and_order)
        yield


# -- domains ---------------------------------------------------------------------------------------


async def test_a_domain_of_ours_without_an_instance_is_ended(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    begin(libvirtd, gpud.store.owner)
    await gpud.reconciler.once()
    assert libvirtd.guests == {}
    assert orphans(gpud, "domain") == 1


@pytest.mark.parametrize("owner", [None, "another-gpud"], ids=["no mark", "another gpud's"])
async def test_a_domain_that_is_not_ours_is_never_touched(
    gpud: Gpud, libvirtd: LibvirtDaemon, owner: str | None
) -> None:
    guest = begin(libvirtd, owner)
    await gpud.reconciler.once()
    assert list(libvirtd.guests.values()) == [guest]
    assert "destroy" not in libvirtd.calls


async def test_the_domain_of_a_live_instance_is_left(gpud: Gpud, libvirtd: LibvirtDaemon) -> None:
    instance = await gpud.running()
    await gpud.reconciler.once()
    assert list(libvirtd.guests) == [instance.domain_uuid]
    assert gpud.directories() == {instance.upstream_id}
    name = lease_name(instance.upstream_id, gpud.store.owner)
    assert libvirtd.networks["gpud"].hosts() == {name: str(instance.grant.address)}


async def test_an_order_that_arrives_after_the_listing_is_no_orphan(
    gpud: Gpud, libvirtd: LibvirtDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = begin(libvirtd, gpud.store.owner)
    directory(gpud)
    with an_order_in_between(gpud, monkeypatch, ORPHAN):
        await gpud.reconciler.once()
    assert libvirtd.guests[guest.uuid] is guest
    assert ORPHAN in gpud.directories()
    assert orphans(gpud, "domain") == orphans(gpud, "directory") == 0


async def test_a_domain_that_cannot_be_ended_keeps_its_files_and_lease_and_holds_up_no_other(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    await gpud.reconciler.once()
    for number, upstream_id in enumerate((ORPHAN, SECOND_ORPHAN), start=50):
        begin(libvirtd, gpud.store.owner, upstream_id)
        directory(gpud, upstream_id)
        address = IPv4Address(f"10.77.0.{number}")
        name = lease_name(upstream_id, gpud.store.owner)
        await gpud.hypervisor.add_lease("gpud", f"52:00:00:00:00:{number}", address, name)
    libvirtd.fault("destroy", error("device or resource busy"))
    await gpud.reconciler.once()
    assert [guest.name for guest in libvirtd.guests.values()] == [f"{DOMAIN_PREFIX}{ORPHAN}"]
    assert gpud.directories() == {ORPHAN}
    assert list(libvirtd.networks["gpud"].hosts()) == [lease_name(ORPHAN, gpud.store.owner)]
    assert orphans(gpud, "domain") == 1
    await gpud.reconciler.once()
    assert libvirtd.guests == {}
    assert gpud.directories() == set()
    assert libvirtd.networks["gpud"].hosts() == {}


# -- leases ----------------------------------------------------------------------------------------


async def test_a_lease_of_ours_without_an_instance_is_taken_back_and_others_stay(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    await gpud.reconciler.once()
    ours = lease_name(ORPHAN, gpud.store.owner)
    another_gpuds = lease_name(SECOND_ORPHAN, "0123456789abcdef")
    names = [ours, "printer", ORPHAN, f"{DOMAIN_PREFIX}printer", another_gpuds]
    for number, name in enumerate(names):
        address = IPv4Address("10.77.0.100") + number
        await gpud.hypervisor.add_lease("gpud", f"52:00:00:00:00:0{number}", address, name)
    await gpud.reconciler.once()
    assert list(libvirtd.networks["gpud"].hosts()) == names[1:]
    assert orphans(gpud, "lease") == 1


async def test_the_network_is_there_after_the_first_look(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    assert libvirtd.networks == {}
    await gpud.reconciler.once()
    assert libvirtd.networks["gpud"].live is not None


async def test_without_a_network_of_ours_none_is_looked_at(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon
) -> None:
    gpud = await start_gpud(mode="user")
    await gpud.reconciler.once()
    assert "networkLookupByName" not in libvirtd.calls
    assert libvirtd.networks == {}


# -- files -----------------------------------------------------------------------------------------


async def test_a_directory_without_an_instance_is_removed_and_others_stay(gpud: Gpud) -> None:
    (directory(gpud) / "disk.qcow2").touch()
    for name in ("lost+found", "i-short", "i-00000000000000aA"):
        directory(gpud, name)
    await gpud.reconciler.once()
    assert gpud.directories() == {"lost+found", "i-short", "i-00000000000000aA"}
    assert orphans(gpud, "directory") == 1


@pytest.mark.leaves_a_mess
async def test_something_of_somebody_else_in_an_orphans_directory_is_left(gpud: Gpud) -> None:
    for name in ("disk.qcow2", "thesis.tex"):
        (gpud.config.state_dir / "instances" / ORPHAN).mkdir(parents=True, exist_ok=True)
        (gpud.config.state_dir / "instances" / ORPHAN / name).touch()
    await gpud.reconciler.once()
    left = (gpud.config.state_dir / "instances" / ORPHAN).iterdir()
    assert [file.name for file in left] == ["thesis.tex"]


@pytest.mark.leaves_a_mess
async def test_what_cannot_be_removed_is_told_of_and_holds_up_no_other(gpud: Gpud) -> None:
    directory(gpud, SECOND_ORPHAN)
    (gpud.config.state_dir / "instances" / ORPHAN).touch()
    with structlog.testing.capture_logs() as logs:
        await gpud.reconciler.once()
    assert gpud.directories() == {ORPHAN}
    told = [log for log in logs if log["log_level"] == "error"]
    assert [log["name"] for log in told] == [ORPHAN]
    assert orphans(gpud, "directory") == 1


# -- consoles --------------------------------------------------------------------------------------


async def fail(gpud: Gpud, libvirtd: LibvirtDaemon, instance_id: str) -> Instance:
    libvirtd.fault("createXML", error("no such machine type"))
    instance = await gpud.order(instance_id)
    gpud.consoles.append(instance.upstream_id, b"kernel panic\n")
    return await gpud.ended(instance)


async def test_consoles_of_live_ones_and_of_the_newest_failed_are_kept(
    gpud: Gpud, libvirtd: LibvirtDaemon, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(reconcile_module, "_CONSOLES_OF_FAILED", 2)
    failed = []
    for number in range(3):
        clock.advance(1)
        failed.append((await fail(gpud, libvirtd, f"bad-{number}")).upstream_id)
    live = await gpud.running()
    gpud.consoles.append(live.upstream_id, b"login:")
    terminated = await gpud.deleted(await gpud.running("good"))
    gpud.consoles.append(terminated.upstream_id, b"bye")
    gpud.consoles.append(ORPHAN, b"never heard of")
    (gpud.config.state_dir / "console" / "README").touch()
    await gpud.reconciler.once()
    assert gpud.consoles.kept() == {*failed[1:], live.upstream_id}
    deleted = await gpud.store.request_delete(failed[2])
    assert deleted is not None
    assert deleted.status is Status.TERMINATED
    await gpud.reconciler.once()
    assert gpud.consoles.kept() == {*failed[:2], live.upstream_id} - {failed[0]}


# -- events ----------------------------------------------------------------------------------------


async def test_each_removal_is_an_event(gpud: Gpud, libvirtd: LibvirtDaemon) -> None:
    await gpud.reconciler.once()
    begin(libvirtd, gpud.store.owner)
    directory(gpud)
    lease = lease_name(ORPHAN, gpud.store.owner)
    await gpud.hypervisor.add_lease("gpud", "52:00:00:00:00:01", IPv4Address("10.77.0.99"), lease)
    await gpud.reconciler.once()
    events = await gpud.store.events(ORPHAN)
    assert [(one.was, one.became, one.why) for one in events] == [
        ("orphan", "removed", f"domain {DOMAIN_PREFIX}{ORPHAN} had no instance"),
        ("orphan", "removed", f"directory {ORPHAN} had no instance"),
        ("orphan", "removed", f"lease {lease} had no instance"),
    ]


async def test_an_orphan_that_cannot_be_removed_is_one_event_however_often_it_is_found(
    gpud: Gpud,
) -> None:
    in_the_way = gpud.config.state_dir / "instances" / ORPHAN
    in_the_way.parent.mkdir(exist_ok=True)
    in_the_way.touch()
    for _ in range(3):
        await gpud.reconciler.once()
    (event,) = await gpud.store.events(ORPHAN)
    assert event.became == "not removed"
    in_the_way.unlink()
    for _ in range(2):
        in_the_way.mkdir()
        await gpud.reconciler.once()
    became = [one.became for one in await gpud.store.events(ORPHAN)]
    assert became == ["not removed", "removed", "removed"]


# -- for as long as the daemon lives ---------------------------------------------------------------


async def test_it_looks_again_whatever_went_wrong_the_last_time(
    gpud: Gpud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile_module, "_EVERY_S", 0.001)
    looks: list[int] = []
    faults = [GpudError(Code.GUEST_FAILED, "x"), OSError("y"), ValueError("a defect")]

    async def recent(_store: Store, _limit: int) -> list[Instance]:
        looks.append(len(faults))
        if faults:
            raise faults.pop()
        return []

    gpud.consoles.append(ORPHAN, b"x")
    monkeypatch.setattr(Store, "recent", recent)
    task = asyncio.create_task(gpud.reconciler.run())
    await until(lambda: 0 in looks)
    assert looks[:4] == [3, 2, 1, 0]
    await until(lambda: not gpud.consoles.kept())
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_it_waits_while_libvirt_is_away(gpud: Gpud, libvirtd: LibvirtDaemon) -> None:
    begin(libvirtd, gpud.store.owner)
    libvirtd.stop()
    await until(lambda: not gpud.hypervisor.available)
    calls = len(libvirtd.calls)
    task = asyncio.create_task(gpud.reconciler.run())
    await asyncio.sleep(0.01)
    assert "listAllDomains" not in libvirtd.calls[calls:]
    libvirtd.start()
    await until(lambda: not libvirtd.guests)
    task.cancel()
    await asyncio.wait([task])


async def test_an_instance_in_any_step_is_no_orphan(gpud: Gpud, libvirtd: LibvirtDaemon) -> None:
    libvirtd.on_start = lambda _guest: None
    instance = await gpud.reach(await gpud.order(), Step.AWAIT_READY)
    await gpud.reconciler.once()
    assert list(libvirtd.guests) == [instance.domain_uuid]
    assert gpud.directories() == {instance.upstream_id}
