"""The look at a whole server: twice, with the daemon's own word or without, and what lasts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from gpud import adminclient, listeners
from gpud.api.admin import Admin
from gpud.audit import look as look_module
from gpud.audit.facts import Kind
from gpud.audit.judge import judge, standing
from gpud.audit.look import look
from gpud.desk import OrderDesk
from gpud.errors import Code, GpudError
from gpud.model import Step
from tests.unit.audit.odds import ORPHAN, rewrite
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import Clock
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Gpud

pytestmark = pytest.mark.leaves_a_mess


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_module, "_BETWEEN_S", 0)


async def nothing() -> list[str]:
    return []


async def untold(*_: object) -> dict[str, Any]:
    return {}


@pytest.fixture
async def socket(gpud: Gpud) -> AsyncIterator[Path]:
    """Where the daemon listens."""
    desk = OrderDesk(
        gpud.config, gpud.store, gpud.inventory, gpud.images, lambda: True, gpud.metrics
    )
    door = Admin(
        gpud.store,
        desk,
        gpud.inventory,
        gpud.cleaner.release,
        gpud.consoles,
        reconcile=gpud.reconciler.once,
        reload=nothing,
        overview=untold,
        in_full=untold,
    )
    async with AsyncExitStack() as stack:
        path = gpud.config.admin_socket_path
        await listeners.admin(stack, path, door.build_app())
        yield path


def orphan(gpud: Gpud) -> Path:
    path = gpud.config.state_dir / "instances" / ORPHAN
    path.mkdir(parents=True)
    return path


# -- all of it -------------------------------------------------------------------------------------


async def test_a_server_in_order(start_gpud: StartGpud, tmp_path: Path) -> None:
    gpud = await start_gpud(mode="user")
    findings, why_not_asked = await look(gpud.config, tmp_path / "nobody.sock")
    assert findings == []
    assert f"no daemon answers on {tmp_path / 'nobody.sock'}" in why_not_asked


async def test_the_daemon_is_asked_when_it_is_up(gpud: Gpud, socket: Path) -> None:
    path = orphan(gpud)
    findings, why_not_asked = await look(gpud.config, socket)
    assert why_not_asked == ""
    assert [(one.kind, one.subject) for one in findings] == [
        (Kind.LEAK, f"directory of {path.name}")
    ]


async def test_a_daemon_that_goes_away_in_between_is_not_held_against_the_server(
    gpud: Gpud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[object] = [{"instances": [], "gpus": []}] * 2

    def get(socket: Path, path: str) -> object:
        if not answers:
            raise GpudError(Code.STATE_UNUSABLE, f"no daemon answers on {socket}{path}")
        return answers.pop()

    path = tmp_path / "gpud.sock"
    path.touch()
    monkeypatch.setattr(adminclient, "get", get)
    await gpud.running()
    findings, why_not_asked = await look(gpud.config, path)
    assert "no daemon answers" in why_not_asked
    assert not any("by what the daemon says" in one.what for one in findings)


async def test_without_libvirt_there_is_no_verdict(
    gpud: Gpud, libvirtd: LibvirtDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look_module, "_CONNECT_S", 0.01)
    libvirtd.stop()
    with pytest.raises(GpudError, match="libvirt does not answer") as caught:
        await look(gpud.config, tmp_path / "nobody.sock")
    assert caught.value.code is Code.HYPERVISOR_UNAVAILABLE
    libvirtd.start()


# -- what lasts ------------------------------------------------------------------------------------


async def test_what_one_look_alone_finds_does_not_count(gpud: Gpud) -> None:
    path = orphan(gpud)
    first = await gpud.facts()
    path.rmdir()
    second = await gpud.facts()
    assert judge(first) != []
    assert standing(first, second) == standing(second, first) == []
    assert standing(first, first) == judge(first)


async def test_an_instance_that_moved_on_is_not_accused(
    gpud: Gpud, libvirtd: LibvirtDaemon, clock: Clock
) -> None:
    libvirtd.on_start = lambda _guest: None
    instance = await gpud.reach(await gpud.order(), Step.AWAIT_READY)
    seed = gpud.config.state_dir / "instances" / instance.upstream_id / "seed.iso"
    seed.unlink()
    first = await gpud.facts()
    assert standing(first, await gpud.facts()) == judge(first) != []
    clock.advance(1)
    libvirtd.guests[instance.domain_uuid].boots()
    await gpud.reach(instance, Step.RUNNING)
    second = await gpud.facts()
    assert len(judge(second)) == 1
    assert standing(first, second) == []


# -- what cannot be read ---------------------------------------------------------------------------


async def test_without_a_state_file_there_is_no_verdict(gpud: Gpud) -> None:
    elsewhere = gpud.config.model_copy(update={"state_dir": gpud.config.state_dir / "elsewhere"})
    with pytest.raises(GpudError, match="cannot be opened") as caught:
        await look(elsewhere, gpud.config.admin_socket_path)
    assert caught.value.code is Code.STATE_UNUSABLE


async def test_a_record_that_makes_no_sense_is_not_judged(gpud: Gpud) -> None:
    await gpud.running()
    rewrite(gpud, "UPDATE instance SET step = 'dancing'")
    with pytest.raises(GpudError, match="cannot be read: 'dancing'") as caught:
        await gpud.findings()
    assert caught.value.code is Code.STATE_UNUSABLE


async def test_a_directory_that_cannot_be_read_is_told(gpud: Gpud) -> None:
    directory = gpud.config.state_dir / "instances"
    directory.mkdir(exist_ok=True)
    (directory / ORPHAN).symlink_to(ORPHAN)
    with pytest.raises(GpudError, match="cannot be looked at") as caught:
        await gpud.findings()
    assert "as root" in caught.value.hint
