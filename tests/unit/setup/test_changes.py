"""Every change from one end to the other: needed, made, already made, undone, changed by hand since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from gpud.setup import access, bootloader, early, modules, nouveau, pages
from gpud.setup.change import State
from tests.unit.setup.host import Host

MOUNT = "/etc/systemd/system/dev-hugepages1G.mount"


@dataclass(frozen=True)
class Case:
    """A change, and what makes it needed.

    Attributes:
        boots: It waits for a boot.
        stays: Taken back, it is in force until a boot.
        boot: What the kernel is like then, beside its command line.
    """

    name: str
    need: Callable[[Host], object]
    file: str = ""
    options: tuple[str, ...] = ()
    boots: bool = False
    stays: bool = False
    boot: Callable[[Host], object] = lambda _: None


def no_vfio(host: Host) -> None:
    host.kernel.remove_driver("vfio-pci")
    host.remove("/usr/lib/modules-load.d/gpud.conf")


def gain_iommu(host: Host) -> None:
    host.kernel.pull(host.gpu)
    host.kernel.add_function("0000:01:00.0", driver="nvidia", group=1)


def driven_by(driver: str) -> Callable[[Host], None]:
    def change(host: Host) -> None:
        host.kernel.pull(host.gpu)
        host.gpu = host.kernel.add_function("0000:01:00.0", driver=driver, group=1)

    return change


def huge(size: str) -> Callable[[Host], None]:
    def change(host: Host) -> None:
        host.configure(guest={"hugepages": size})
        for kib in (2048, 1048576):
            host.write(f"/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages", "0\n")

    return change


def set_aside(host: Host) -> None:
    assert "hugepagesz=1G hugepages=16" in host.text("/proc/cmdline")
    host.write("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "16\n")


CASES = [
    Case("kernel arguments", Host.without_iommu, bootloader.DROP_IN, boots=True, boot=gain_iommu),
    Case("kernel arguments", huge("1G"), bootloader.DROP_IN, boots=True, boot=set_aside),
    Case("kernel modules", no_vfio, modules.FILE),
    Case("kernel modules", lambda host: host.remove("/dev/kvm"), modules.FILE),
    Case("early binding", lambda _: None, early.SCRIPT, ("all",), True, boot=driven_by("vfio-pci")),
    Case("nouveau", driven_by("nouveau"), nouveau.FILE, (), True, boot=driven_by("nvidia")),
    Case("huge pages", huge("2M"), pages.FILE, stays=True),
    Case("hugetlbfs of 1G", huge("1G"), MOUNT),
    Case("/dev/kvm", lambda host: host.write("/dev/kvm", "", 0o600), access.RULE),
    Case("access of gpud", lambda host: host.write("/etc/group", "kvm:x:104:\nlibvirt:x:1:\n")),
    Case("libvirt", lambda host: host.units.update({"libvirtd.service": "disabled"})),
]
NAMES = [f"{number}-{case.name}" for number, case in enumerate(CASES)]
every_change = pytest.mark.parametrize("case", CASES, ids=NAMES)
every_file = pytest.mark.parametrize("case", [case for case in CASES if case.file])


async def test_a_server_that_is_set_up_needs_no_change(host: Host) -> None:
    assert {one.name for one in await host.plan() if one.state is not State.FINE} == {"image"}


@every_change
async def test_what_is_needed_is_made_and_then_not_made_again(host: Host, case: Case) -> None:
    case.need(host)
    assert await host.state(case.name, *case.options) is State.CHANGE
    assert await host.make(*case.options)
    after = State.REBOOT if case.boots else State.FINE
    assert await host.state(case.name) is after
    assert not await host.make()
    host.boot()
    case.boot(host)
    assert await host.state(case.name) is State.FINE
    assert not await host.make()


@every_change
async def test_what_was_made_is_taken_back(host: Host, case: Case) -> None:
    case.need(host)
    group, units = host.text("/etc/group"), dict(host.units)
    await host.make(*case.options)
    made = await host.undo()
    assert not made.left
    assert any(case.file in one for one in made.until_boot) is (case.boots or case.stays)
    assert not case.file or not host.server.exists(case.file)
    assert host.text("/etc/group") == group
    assert {name: host.units.get(name) for name in units} == units
    assert not host.server.names("/etc/systemd/system")
    assert not (await host.undo()).left
    assert not host.ran


@every_file
async def test_what_was_changed_by_hand_is_left_and_told(host: Host, case: Case) -> None:
    case.need(host)
    await host.make(*case.options)
    host.write(case.file, host.text(case.file) + "# mine\n")
    found = await host.item(case.name, *case.options)
    assert found.state is State.BY_HAND
    assert f"{case.file} was changed since" in found.what
    await host.make(*case.options)
    assert (await host.undo()).left == (f"{case.file} was changed since",)
    assert host.text(case.file).endswith("# mine\n")


@every_file
async def test_a_file_of_somebody_else_is_left_and_told(host: Host, case: Case) -> None:
    case.need(host)
    host.write(case.file, "theirs\n")
    found = await host.item(case.name, *(case.options or ("all",)))
    assert found.state is State.BY_HAND
    assert f"{case.file} is not of gpud" in found.what
    await host.make(*case.options)
    assert not (await host.undo()).left
    assert host.text(case.file) == "theirs\n"


@pytest.mark.parametrize("case", [case for case in CASES if case.boots])
async def test_what_a_boot_did_not_put_into_force_is_told(host: Host, case: Case) -> None:
    case.need(host)
    await host.make(*case.options)
    host.boot()
    host.write("/proc/cmdline", "ro iommu=pt\n")
    found = await host.item(case.name)
    assert found.state is State.BY_HAND
    assert "although the server was booted since" in found.what
