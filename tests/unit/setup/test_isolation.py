"""The IOMMU: what the kernel is told, and what only the firmware can change."""

from __future__ import annotations

import pytest

from gpud.setup.bootloader import DROP_IN, GRUB_CONFIG
from gpud.setup.change import State
from tests.unit.setup.host import DEFAULT, GRUB, Host

AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu svm\n"
LOADER = "/sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"


def amd(host: Host) -> None:
    host.write("/proc/cpuinfo", AMD)
    host.remove("/sys/firmware/acpi/tables/DMAR")
    host.write("/sys/firmware/acpi/tables/IVRS", "")


def given(host: Host, arguments: str) -> None:
    host.write("/etc/default/grub", DEFAULT.format(arguments))
    host.write(GRUB_CONFIG, GRUB.format(arguments))
    host.boot()


async def test_an_intel_server_is_booted_with_its_iommu(host: Host) -> None:
    host.without_iommu()
    await host.make()
    assert host.text(DROP_IN).splitlines()[-1] == (
        'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT intel_iommu=on iommu=pt"'
    )
    assert "quiet intel_iommu=on iommu=pt\n" in host.text(GRUB_CONFIG)


async def test_an_amd_server_uses_its_iommu_by_itself(host: Host) -> None:
    amd(host)
    given(host, "quiet")
    change = await host.change("kernel arguments")
    assert change.what == "boot Linux with iommu=pt"


async def test_whose_iommu_it_is_its_table_tells_and_not_the_cpu(host: Host) -> None:
    host.write("/proc/cpuinfo", AMD)
    host.without_iommu()
    change = await host.change("kernel arguments")
    assert change.what == "boot Linux with intel_iommu=on iommu=pt"


@pytest.mark.parametrize("told", ["iommu=nopt", "iommu.passthrough=0", "iommu=pt"])
async def test_what_the_operator_decided_on_translation_stays(host: Host, told: str) -> None:
    given(host, f"intel_iommu=on {told}")
    assert not [one for one in await host.plan() if one.name == "kernel arguments"]


async def test_a_kernel_that_translates_for_none_of_its_own_needs_no_telling(host: Host) -> None:
    given(host, "intel_iommu=on")
    assert await host.state("kernel arguments") is State.CHANGE
    host.write("/sys/kernel/iommu_groups/1/type", "identity\n")
    assert not [one for one in await host.plan() if one.name == "kernel arguments"]


async def test_what_was_given_once_in_grubs_menu_is_made_to_last(host: Host) -> None:
    given(host, "quiet iommu=pt")
    host.write("/proc/cmdline", "quiet iommu=pt intel_iommu=on\n")
    change = await host.change("kernel arguments")
    assert change.what == "boot Linux with intel_iommu=on"
    await host.make()
    assert await host.state("kernel arguments") is State.FINE


async def test_who_may_not_read_what_grub_does_is_told_nothing_of_it(host: Host) -> None:
    host.write(GRUB_CONFIG, "")
    assert not [one for one in await host.plan() if one.name == "kernel arguments"]


@pytest.mark.parametrize("table", ["DMAR", "IVRS"])
async def test_an_iommu_that_the_firmware_hides_is_to_be_turned_on_there(
    host: Host, table: str
) -> None:
    if table == "IVRS":
        amd(host)
    host.without_iommu()
    host.remove(f"/sys/firmware/acpi/tables/{table}")
    found = await host.item("IOMMU")
    assert found.state is State.BY_HAND
    assert ("VT-d" if table == "DMAR" else "AMD-Vi") in found.mend
    assert not [one for one in await host.plan() if one.name == "kernel arguments"]


@pytest.mark.parametrize("vendor", ["intel", "amd"])
async def test_an_iommu_that_linux_does_not_use_although_told_to_is_told(
    host: Host, vendor: str
) -> None:
    host.without_iommu()
    if vendor == "amd":
        amd(host)
    given(host, "intel_iommu=on iommu=pt")
    found = await host.item("IOMMU")
    assert (found.state, "does not use it" in found.what) == (State.BY_HAND, True)


@pytest.mark.parametrize("word", ["iommu=off", "intel_iommu=off", "amd_iommu=off", "intremap=off"])
async def test_an_iommu_that_somebody_turned_off_is_his_to_turn_on(host: Host, word: str) -> None:
    host.without_iommu()
    given(host, word)
    found = await host.item("IOMMU")
    assert (found.state, found.what) == (State.BY_HAND, f"Linux was booted with {word}")
    named = [one.what for one in await host.plan() if one.name == "kernel arguments"]
    assert not any("intel_iommu" in what for what in named)


async def test_interrupts_that_are_not_remapped_are_the_firmwares(host: Host) -> None:
    host.write("/proc/interrupts", "  0:  9  IO-APIC 2-edge timer\n")
    found = await host.item("IOMMU")
    assert (found.state, "x2APIC" in found.mend) == (State.BY_HAND, True)


async def test_systemd_boot_is_told_by_hand_what_is_missing(host: Host) -> None:
    host.without_iommu()
    host.write(LOADER, "\x06\0\0\0" + "\0".join("systemd-boot 252.39-1"))
    found = await host.item("kernel arguments")
    assert (found.state, "/etc/kernel/cmdline" in found.mend) == (State.BY_HAND, True)
    assert "intel_iommu=on iommu=pt as one line" in found.mend


async def test_an_unknown_boot_loader_is_not_guessed_at(host: Host) -> None:
    host.without_iommu()
    host.remove("/usr/sbin/update-grub")
    found = await host.item("kernel arguments")
    assert (found.state, "boot loader is not known" in found.mend) == (State.BY_HAND, True)
    assert not await host.make()
    host.write("/proc/cmdline", "intel_iommu=on ro\n")
    assert "add iommu=pt to" in (await host.item("kernel arguments")).mend


async def test_arguments_that_an_unknown_boot_loader_gives_are_fine(host: Host) -> None:
    host.without_iommu()
    await host.make()
    host.remove("/usr/sbin/update-grub")
    host.boot()
    assert await host.state("kernel arguments") is State.FINE
