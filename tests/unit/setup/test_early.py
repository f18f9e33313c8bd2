"""Cards on vfio-pci from boot on."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from gpud.errors import Code, GpudError
from gpud.setup.change import State
from gpud.setup.early import SCRIPT
from tests.unit.setup.host import Host

FIRST, COMPANION, SECOND = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"
IDS = "0x10de:0x2330"


@pytest.fixture
def host(host: Host) -> Host:
    host.kernel.add_function(COMPANION, driver="snd_hda_intel", group=1, class_code=0x040300)
    host.kernel.add_function(SECOND, driver="nvidia", group=2)
    return host


def kept(host: Host) -> list[str]:
    lines = host.text(SCRIPT).splitlines()
    return [line.removeprefix("keep ") for line in lines if line.startswith("keep 0")]


def boots_on(host: Host, address: str) -> None:
    (host.server.at(f"/sys/bus/pci/devices/{address}") / "boot_vga").write_text("1\n")


def run(*arguments: str | Path) -> None:
    subprocess.run(["sh", *arguments], check=True)


async def test_a_card_goes_with_its_companions(host: Host) -> None:
    await host.make(FIRST)
    assert kept(host) == [f"{FIRST} {IDS}", f"{COMPANION} {IDS}"]
    assert host.server.at(SCRIPT).stat().st_mode & 0o777 == 0o755


async def test_a_card_may_be_named_by_any_of_its_functions(host: Host) -> None:
    await host.make(COMPANION)
    assert len(kept(host)) == 2


async def test_a_choice_replaces_the_one_before_and_stays_until_the_next(host: Host) -> None:
    await host.make(FIRST)
    await host.make(SECOND)
    assert kept(host) == [f"{SECOND} {IDS}"]
    assert await host.state("early binding") is State.REBOOT
    assert not await host.make()
    await host.make("all")
    assert len(kept(host)) == 3


async def test_without_a_choice_nothing_is_bound(host: Host) -> None:
    assert not [one for one in await host.plan() if one.name == "early binding"]


async def test_the_console_of_the_server_is_left_out_of_all_and_that_is_told(host: Host) -> None:
    boots_on(host, FIRST)
    left, change = [one for one in await host.plan("all") if one.name == "early binding"]
    assert left.state is State.BY_HAND
    assert left.what == f"{FIRST} shows this server's console, so `all` leaves it out"
    assert change.what.endswith(f"have {SECOND}, from boot on")


async def test_the_console_of_the_server_is_bound_where_it_is_named_and_that_is_told(
    host: Host,
) -> None:
    boots_on(host, FIRST)
    change = await host.change("early binding", FIRST, "all")
    assert any("another way in" in one for one in change.warnings)
    assert SECOND in change.what


async def test_who_has_a_card_open_is_told(host: Host) -> None:
    host.write(f"/proc/driver/nvidia/gpus/{FIRST}/information", "Device Minor: 0\n")
    host.kernel.add_process(77, "python3", "/dev/nvidia0")
    change = await host.change("early binding", FIRST)
    assert change.warnings[0] == f"{FIRST} is in use by python3 (pid 77), which loses it at boot"


@pytest.mark.parametrize("text", ["0000:09:00.0", "01:00.0", "card"])
async def test_what_is_no_card_is_refused(host: Host, text: str) -> None:
    with pytest.raises(GpudError) as error:
        await host.plan(text)
    assert error.value.code is Code.GPU_NOT_FOUND


async def test_without_initramfs_tools_nothing_is_guessed(host: Host) -> None:
    host.remove("/usr/sbin/update-initramfs")
    found = await host.item("early binding", FIRST)
    assert (found.state, "initramfs-tools" in found.mend) == (State.BY_HAND, True)


@pytest.mark.real_command("sh")
async def test_the_script_lets_nobody_but_vfio_pci_have_what_is_what_it_was(
    host: Host, tmp_path: Path
) -> None:
    """The script itself, with the tree in the place of ``/sys``."""
    await host.make("all")
    (host.server.at(f"/sys/bus/pci/devices/{SECOND}") / "device").write_text("0x2331\n")
    host.kernel.pull(host.kernel.addresses[1])
    script, told = tmp_path / "script", tmp_path / "told-"
    text = host.text(SCRIPT).replace("/sys/", f"{host.root}/sys/")
    script.write_text(text.replace("/dev/kmsg", f"{told}$1"))
    await asyncio.to_thread(run, "-eu", script, "prereqs")
    assert not list(tmp_path.glob("told-*"))
    await asyncio.to_thread(run, "-u", script)
    bus = host.server.at("/sys/bus/pci")
    assert (bus / f"devices/{FIRST}/driver_override").read_text() == "vfio-pci\n"
    assert (bus / "drivers/nvidia/unbind").read_text() == f"{FIRST}\n"
    assert (bus / "drivers_probe").read_text() == f"{FIRST}\n"
    assert (bus / f"devices/{SECOND}/driver_override").read_text() == "(null)\n"
    assert {one.name: one.read_text() for one in tmp_path.glob("told-*")} == {
        f"told-{COMPANION}": f"gpud: at {COMPANION} is nothing:, not {IDS}, so its driver may have it\n",
        f"told-{SECOND}": f"gpud: at {SECOND} is 0x10de:0x2331, not {IDS}, so its driver may have it\n",
    }
