"""Modules, nouveau, access, libvirt, the firmware's part and the image."""

from __future__ import annotations

import pytest

from gpud import command
from gpud.guest.image import ImageStore
from gpud.setup import modules
from gpud.setup.change import State
from tests.unit.fakes.qemu_img import QemuImg, base_image
from tests.unit.setup.host import GROUP, PASSWD, Host

FIRST = "0000:01:00.0"


def driven_by_nouveau(host: Host) -> None:
    host.kernel.pull(host.gpu)
    host.gpu = host.kernel.add_function(FIRST, driver="nouveau", group=1)


# ---- modules


async def test_a_module_that_is_loaded_now_is_loaded_at_boot_as_well(host: Host) -> None:
    host.remove("/usr/lib/modules-load.d/gpud.conf")
    assert await host.make() == ["modprobe vfio-pci"]
    assert host.text(modules.FILE).splitlines()[1:] == ["vfio-pci"]


async def test_a_module_that_is_to_be_loaded_at_boot_is_loaded_now_as_well(host: Host) -> None:
    host.kernel.remove_driver("vfio-pci")
    assert await host.make() == ["modprobe vfio-pci"]


@pytest.mark.parametrize("file", ["/etc/modules", "/etc/modules-load.d/mine.conf"])
async def test_whoever_names_a_module_it_is_loaded(host: Host, file: str) -> None:
    host.remove("/usr/lib/modules-load.d/gpud.conf")
    host.write(file, "; a remark\n# another\n\n vfio_pci ids=1:2\n")
    assert await host.state("kernel modules") is State.FINE


async def test_a_file_that_hides_another_is_the_one_that_counts(host: Host) -> None:
    host.write("/etc/modules-load.d/gpud.conf", "")
    assert await host.state("kernel modules") is State.CHANGE


async def test_a_built_in_module_needs_no_loading(host: Host) -> None:
    host.remove("/usr/lib/modules-load.d/gpud.conf")
    host.remove("/sys/module/vfio_pci/initstate")
    assert await host.state("kernel modules") is State.FINE


@pytest.mark.parametrize(("vendor", "name"), [("GenuineIntel", "intel"), ("AuthenticAMD", "amd")])
async def test_kvm_is_loaded_where_it_is_missing(host: Host, vendor: str, name: str) -> None:
    host.remove("/dev/kvm")
    host.write("/proc/cpuinfo", f"vendor_id : {vendor}\nflags : vmx svm\n")
    assert f"modprobe kvm_{name}" in await host.make()
    assert await host.state("kernel modules") is State.FINE


async def test_a_cpu_that_runs_no_guests_is_the_firmwares(host: Host) -> None:
    host.write("/proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu\n")
    host.remove("/dev/kvm")
    found = await host.item("virtualisation")
    assert (found.state, "VT-x" in found.mend) == (State.BY_HAND, True)
    assert await host.state("kernel modules") is State.FINE


# ---- nouveau


async def test_nouveau_that_somebody_keeps_out_and_is_there_is_in_the_initramfs(host: Host) -> None:
    driven_by_nouveau(host)
    host.write("/usr/lib/modprobe.d/nvidia.conf", "blacklist   nouveau\n")
    found = await host.item("nouveau")
    assert found.state is State.BY_HAND
    assert found.what.startswith("/usr/lib/modprobe.d/nvidia.conf keeps it from being loaded")


async def test_what_else_goes_dark_without_nouveau_is_told(host: Host) -> None:
    driven_by_nouveau(host)
    (host.server.at(f"/sys/bus/pci/devices/{FIRST}") / "boot_vga").write_text("1\n")
    host.kernel.add_function("0000:05:00.0", device=0x1C82, driver="nouveau", group=5)
    host.remove("/usr/sbin/update-initramfs")
    change = await host.change("nouveau")
    assert not change.after
    other, console, initramfs = change.warnings
    assert other.startswith("0000:05:00.0 (10de:1c82), which is not on offer")
    assert console.startswith(f"{FIRST} shows this server's console")
    assert initramfs.startswith("if the initramfs has nouveau")


# ---- access


async def test_a_user_whose_own_group_it_is_needs_no_membership(host: Host) -> None:
    host.write("/etc/group", GROUP.replace("libvirt:x:105:gpud", "libvirt:x:990:"))
    assert (await host.item("access of gpud")).what == "gpud has libvirt for its own group"


async def test_qemu_gets_into_the_group_of_kvm(host: Host) -> None:
    host.write("/etc/passwd", PASSWD.replace("64055:104", "64055:64055"))
    assert await host.make() == ["usermod -aG kvm libvirt-qemu"]


@pytest.mark.parametrize(
    ("path", "text", "what", "mend"),
    [
        ("/etc/passwd", "libvirt-qemu:x:1:104::/:/x\n", "there is no user gpud", "gpud's package"),
        ("/etc/passwd", "gpud:x:1:1::/:/x\n", "there is no user libvirt-qemu", "its package"),
        ("/etc/group", "kvm:x:104:\n", "there is no group libvirt", "apt install libvirt"),
    ],
)
async def test_who_is_missing_is_told(
    host: Host, path: str, text: str, what: str, mend: str
) -> None:
    host.write(path, text)
    (found,) = [one for one in await host.plan() if one.state is State.BY_HAND and one.what == what]
    assert found.mend.startswith(mend)


async def test_a_device_of_its_group_is_open_enough(host: Host) -> None:
    group = host.server.at("/dev/kvm").stat().st_gid
    host.write("/etc/group", GROUP.replace("kvm:x:104", f"kvm:x:{group}"))
    host.write("/dev/kvm", "", mode=0o660)
    assert await host.state("/dev/kvm") is State.FINE
    host.write("/dev/kvm", "", mode=0o600)
    assert await host.state("/dev/kvm") is State.CHANGE


async def test_a_rule_that_another_one_overrules_is_told(host: Host) -> None:
    host.write("/dev/kvm", "", mode=0o600)
    await host.make()
    host.write("/dev/kvm", "", mode=0o600)
    found = await host.item("/dev/kvm")
    assert (found.state, found.what.endswith("is not in force")) == (State.BY_HAND, True)


# ---- libvirt


@pytest.mark.parametrize(
    ("units", "state", "told"),
    [
        ({"libvirtd.service": "disabled", "libvirtd.socket": "enabled"}, State.FINE, "socket"),
        ({"virtqemud.service": "enabled-runtime"}, State.FINE, "virtqemud.service starts it"),
        ({"libvirtd.service": "masked"}, State.BY_HAND, "systemctl unmask libvirtd.service"),
        ({"virtqemud.socket": "disabled"}, State.BY_HAND, "enable --now virtqemud.socket"),
        ({}, State.BY_HAND, "apt install libvirt-daemon-system"),
    ],
)
async def test_who_starts_libvirt(
    host: Host, units: dict[str, str], state: State, told: str
) -> None:
    host.units = units
    found = await host.item("libvirt")
    assert (found.state, told in found.what + found.mend) == (state, True)


async def test_the_libvirt_of_a_session_is_nobodys_to_start(host: Host) -> None:
    host.units = {}
    host.configure(libvirt={"uri": "qemu:///session"}, network={"mode": "user"})
    assert await host.state("libvirt") is State.FINE
    assert (await host.item("network")).what == "QEMU's own (network.mode: user)"


async def test_the_network_is_the_daemons_to_make(host: Host) -> None:
    assert "gpud, 10.77.0.0/24: gpud makes" in (await host.item("network")).what


async def test_a_missing_image_is_told_with_the_command_that_brings_it_in(host: Host) -> None:
    found = await host.item("image")
    assert found.mend.startswith("runuser -u gpud -- gpud image add FILE --name base")


async def test_an_image_that_is_there_is_fine(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(command, "run", QemuImg().run)
        source = host.root / "source.qcow2"
        source.write_bytes(base_image())
        await ImageStore(host.config.state_dir / "images").add(source, "base")
    assert (await host.item("image")).what.startswith("base, sha256:")


# ---- the firmware, and cards


@pytest.mark.parametrize(
    ("first", "what"), [(0, "a BAR has no address"), (2**30, "below 4 GiB, where")]
)
async def test_bars_without_room_are_the_firmwares(host: Host, first: int, what: str) -> None:
    resource = host.server.at(f"/sys/bus/pci/devices/{FIRST}/resource")
    resource.write_text(f"{first:#x} {first + 2**28 - 1:#x} {0x14220C:#x}\n")
    found = await host.item("firmware")
    assert found.state is State.BY_HAND
    assert what in found.what
    assert "Above 4G" in found.mend
    assert "SR-IOV" in found.mend


async def test_a_foreign_device_in_a_cards_group_is_the_firmwares(host: Host) -> None:
    host.kernel.add_function(
        "0000:02:00.0", vendor=0x144D, driver="nvme", group=1, class_code=0x10802
    )
    found = await host.item("firmware")
    assert found.what.startswith(FIRST)
    assert "ACS" in found.mend


async def test_where_no_card_is_on_offer_nothing_is_changed(host: Host) -> None:
    host.without_iommu()
    host.configure(offers=[])
    assert await host.state("cards") is State.BY_HAND
    assert not await host.make()


async def test_where_stand_ins_are_sold_the_cards_are_left_alone(host: Host) -> None:
    host.without_iommu()
    host.configure(gpus={"stand_ins": [{"gpu_type": "h100_sxm", "count": 2}]})
    assert await host.state("cards") is State.FINE
    assert not await host.make()
