"""Files, memberships and units by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpud import command
from gpud.errors import Code, GpudError
from gpud.setup.parts import Member, TextFile, Unit, part_of, unit_state
from tests.unit.setup.host import Host

FILE = TextFile("/etc/a/b/c.conf", "content\n", mode=0o755)


async def test_a_file_is_written_with_its_mode_and_directories_that_all_may_read(
    host: Host,
) -> None:
    await FILE.make(host.server)
    path = host.server.at(FILE.path)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("content\n", 0o755)
    assert path.parent.stat().st_mode & 0o777 == 0o755
    assert await FILE.holds(host.server)
    assert [one.name for one in path.parent.iterdir()] == ["c.conf"]


async def test_a_file_is_taken_back_more_than_once(host: Host) -> None:
    await FILE.unmake(host.server)
    await FILE.make(host.server)
    await FILE.unmake(host.server)
    await FILE.unmake(host.server)
    assert not host.server.exists(FILE.path)


@pytest.mark.parametrize("target", ["/etc/passwd", "/nowhere"])
async def test_a_link_in_a_files_place_is_of_somebody_else(host: Host, target: str) -> None:
    path = host.server.at(FILE.path)
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    assert FILE.in_the_way(host.server, []) == "/etc/a/b/c.conf is not of gpud"
    assert FILE.in_the_way(host.server, [FILE.fingerprint]).endswith("was changed since")
    assert not await FILE.holds(host.server)


async def test_a_directory_in_a_files_place_is_of_somebody_else(host: Host) -> None:
    host.server.at(FILE.path).mkdir(parents=True)
    assert FILE.in_the_way(host.server, []) == "/etc/a/b/c.conf is not of gpud"
    with pytest.raises(GpudError, match=r"/etc/a/b/c\.conf cannot be removed"):
        await FILE.unmake(host.server)
    with pytest.raises(GpudError, match=r"/etc/a/b/c\.conf cannot be written"):
        await FILE.make(host.server)


async def test_who_is_not_listed_is_no_member(host: Host) -> None:
    assert await Member("gpud", "libvirt").holds(host.server)
    assert not await Member("gpu", "libvirt").holds(host.server)
    assert not await Member("gpud", "nobody").holds(host.server)
    host.write("/etc/group", "libvirt\nbroken:x\n")
    assert not await Member("gpud", "libvirt").holds(host.server)


async def test_a_membership_that_is_gone_is_not_taken_back_again(host: Host) -> None:
    await Member("gpud", "kvm").unmake(host.server)
    await Unit("x.service").unmake(host.server)
    assert not host.ran


async def test_a_unit_that_is_not_there_has_no_state(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.units["new.service"] = "not-found"
    assert await unit_state("new.service") == ""

    async def missing(*_: object, **__: object) -> None:
        raise GpudError(Code.HOST_COMMAND_FAILED, "the program systemctl is not installed")

    monkeypatch.setattr(command, "run", missing)
    assert await unit_state("libvirtd.service") == ""


@pytest.mark.parametrize("part", [TextFile("/etc/x"), Member("a", "b"), Unit("c.mount")])
def test_a_key_stands_for_its_part(part: TextFile | Member | Unit) -> None:
    assert part_of(part.key) == part
    assert part.act.partition(" ")[0] in {"writes", "adds", "enables"}


@pytest.mark.parametrize("key", ["", "file", "file x", "program rm", "member a"])
def test_what_is_no_key_stands_for_nothing(key: str) -> None:
    with pytest.raises(ValueError, match="is no part of a change"):
        part_of(key)


def test_nothing_is_in_the_way_of_what_is_not_there(tmp_path: Path, host: Host) -> None:
    assert not TextFile(str(tmp_path / "x")).in_the_way(host.server, [])
    assert not Member("a", "b").in_the_way(host.server, [])
    assert not Unit("c").in_the_way(host.server, [])
