"""Making that is cut short or refused, and the record of it."""

from __future__ import annotations

import json

import pytest

from gpud.errors import GpudError
from gpud.setup import bootloader, early, modules
from gpud.setup.change import State
from gpud.setup.make import make
from gpud.setup.parts import TextFile
from gpud.setup.record import PATH, load
from tests.unit.setup.host import Host
from tests.unit.setup.test_changes import huge, no_vfio


async def test_commands_that_several_changes_end_with_are_run_once(host: Host) -> None:
    host.kernel.pull(host.gpu)
    host.kernel.add_function("0000:01:00.0", driver="nouveau", group=1)
    assert await host.make("all") == [early.UPDATE]


async def test_what_failed_is_done_the_next_time(host: Host) -> None:
    host.without_iommu()
    host.broken.add("update-grub")
    with pytest.raises(GpudError, match="update-grub ended with status 1"):
        await host.make()
    assert await host.state("kernel arguments") is State.CHANGE
    host.broken.clear()
    assert await host.make() == ["update-grub"]
    assert await host.state("kernel arguments") is State.REBOOT


async def test_what_failed_is_done_the_next_time_where_nothing_shows_it(host: Host) -> None:
    host.broken.add("update-initramfs")
    with pytest.raises(GpudError):
        await host.make("all")
    host.broken.clear()
    assert await host.make() == [early.UPDATE]


async def test_a_failed_undoing_goes_on_the_next_time(host: Host) -> None:
    await host.make("all")
    host.broken.add("update-initramfs")
    with pytest.raises(GpudError):
        await host.undo()
    host.broken.clear()
    await host.undo()
    assert host.ran == [early.UPDATE]


async def test_undoing_does_not_repeat_what_making_could_not_do(host: Host) -> None:
    no_vfio(host)
    host.broken.add("modprobe")
    with pytest.raises(GpudError):
        await host.make()
    assert not (await host.undo()).left
    assert not host.ran
    assert not host.server.exists(modules.FILE)


async def test_a_power_cut_between_the_record_and_the_file_does_no_harm(host: Host) -> None:
    no_vfio(host)
    await host.make()
    host.remove(modules.FILE)
    assert await host.state("kernel modules") is State.CHANGE
    assert not (await host.undo()).left


async def test_a_file_is_known_as_it_was_before_a_power_cut_and_as_it_should_be_after(
    host: Host,
) -> None:
    """The record has the new content, the file still the old one."""
    huge("1G")(host)
    await host.make()
    old = host.text(bootloader.DROP_IN)
    host.configure(guest={"hugepages": "1G"}, host_reserve={"memory_gib": 60})
    await host.make()
    assert "hugepages=4" in host.text(bootloader.DROP_IN)
    record = load(host.server)
    made = record.made[f"file {bootloader.DROP_IN}"]
    host.write(bootloader.DROP_IN, old)
    made.fingerprints = [_digest(old), *made.fingerprints]
    record.save(host.server)
    assert await host.state("kernel arguments") is State.CHANGE
    assert not (await host.undo()).left


def _digest(text: str) -> str:
    return TextFile("/", text).fingerprint


async def test_arguments_that_do_not_come_through_are_told(host: Host) -> None:
    host.without_iommu()
    host.write("/etc/default/grub.d/99-late.cfg", 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n')
    with pytest.raises(GpudError, match=r"grub\.cfg does not say intel_iommu=on iommu=pt") as error:
        await host.make()
    assert "overrides it" in error.value.hint
    assert await host.state("kernel arguments") is State.CHANGE


async def test_the_record_is_for_root_alone(host: Host) -> None:
    await host.make("all")
    path = host.server.at(PATH)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert json.loads(path.read_text())["made"].keys() == {f"file {early.SCRIPT}"}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 2, "made": {}}', '{"version": 1, "made": {"file x": {}}}',
     '{"version": 1, "made": {}, "more": 1}'],
)  # fmt: skip
async def test_a_damaged_record_stops_everything(host: Host, content: str) -> None:
    host.write(PATH, content)
    with pytest.raises(GpudError, match="is damaged"):
        await host.plan()


async def test_a_record_that_may_not_be_read_is_roots(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError

    monkeypatch.setattr(type(host.root), "read_text", refuse)
    with pytest.raises(GpudError, match="is for root to read"):
        load(host.server)


async def test_a_record_that_cannot_be_written_stops_before_anything_is_made(host: Host) -> None:
    no_vfio(host)
    plan = await host.plan()
    changes = [one.change for one in plan if one.change is not None]
    host.server.at(f"{PATH}.new").mkdir(parents=True)
    with pytest.raises(GpudError, match=r"made\.json cannot be written"):
        await make(changes, host.server, lambda _: None)
    assert not host.server.exists(modules.FILE)
