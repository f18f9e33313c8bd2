"""Sealing real disks, and looking into them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from gpud import command
from gpud.doctor.check import Level
from gpud.errors import Code, GpudError
from gpud.golden.ext4 import Ext4
from gpud.golden.facts import VIRTIO, Facts, Kernel
from gpud.golden.inside import collect, lay_out
from gpud.golden.judge import faults
from gpud.golden.seal import check, refuse_unfit, seal
from gpud.golden.traces import TRACES
from tests.unit.golden.conftest import FIT, LEFT_BEHIND, MIB, ROOT_AT, TOOLS, MakeDisk, Tree, run

pytestmark = pytest.mark.real_command(*TOOLS)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    return scratch


def without(*paths: str, **replaced: str) -> Tree:
    return {path: content for path, content in FIT.items() if path not in paths} | replaced


async def names(disk: Path, level: Level, firmware: str = "uefi") -> list[str]:
    found = await check(disk, firmware)  # type: ignore[arg-type]
    return [one.name for one in found if one.level is level]


class TestCheck:
    async def test_a_fit_image_is_well_and_stays_as_it_is(
        self, make_disk: MakeDisk, scratch: Path
    ) -> None:
        disk = make_disk()
        before = hashlib.sha256(disk.read_bytes()).hexdigest()

        found = await check(disk, "uefi")

        assert [(one.name, one.what) for one in found if one.level is not Level.OK] == []
        assert hashlib.sha256(disk.read_bytes()).hexdigest() == before
        assert not list(scratch.iterdir())

    async def test_a_qcow2_image_is_looked_into_as_well(
        self, make_disk: MakeDisk, tmp_path: Path
    ) -> None:
        image = tmp_path / "image.qcow2"
        run(
            "qemu-img", "convert", "-O", "qcow2", str(make_disk({**FIT, **LEFT_BEHIND})), str(image)
        )

        assert "SSH host keys" in [one.name for one in faults(await check(image, "uefi"))]

    async def test_everything_left_behind_is_found(self, make_disk: MakeDisk) -> None:
        found = await check(make_disk({**FIT, **LEFT_BEHIND}), "uefi")

        unwell = {one.name for one in found if one.level is not Level.OK}
        assert unwell == {"machine-id", *(trace.name for trace in TRACES)}

    async def test_accounts_with_a_password_or_none_needed_are_faults(
        self, make_disk: MakeDisk
    ) -> None:
        shadow = "root:$6$x$y:1::::::\nguest::1::::::\nbuild:!:1::::::\nsshd:*:1::::::\n\n"
        found = faults(await check(make_disk(without(**{"etc/shadow": shadow})), "uefi"))

        assert [one.what for one in found] == ["root, guest can log in with one, in every guest"]

    async def test_what_gpud_needs_and_is_not_there_is_a_fault(self, make_disk: MakeDisk) -> None:
        disk = make_disk(
            {
                "etc/passwd": "",
                "etc/systemd/system/cloud-init.service": b"-> /dev/null",
                "boot/vmlinuz-6.1.0-9": "",
            }
        )

        facts = await collect(disk, await lay_out(disk))

        assert facts == Facts(
            machine_id=None,
            traces={trace.name: () for trace in TRACES},
            kernels=(Kernel("6.1.0-9", has_initramfs=False, missing=VIRTIO),),
            cloud_init_off=True,
            ssh_enabled=False,
            serial_console=False,
        )

    async def test_cloud_init_may_be_switched_off_by_a_file(self, make_disk: MakeDisk) -> None:
        disk = make_disk(without(**{"etc/cloud/cloud-init.disabled": ""}))

        assert await names(disk, Level.FAULT) == ["cloud-init"]

    async def test_the_last_word_on_datasources_counts_and_kernels_are_ordered_by_number(
        self, make_disk: MakeDisk
    ) -> None:
        disk = make_disk(
            without(
                **{
                    "etc/cloud/cloud.cfg.d/10_one.cfg": "datasource_list: [Ec2]",
                    "etc/cloud/cloud.cfg.d/20_two.cfg": "datasource_list: [NoCloud]\nsince: 2024-13-45",
                    "etc/cloud/cloud.cfg.d/30_three.cfg": "datasource_list: [",
                    "etc/cloud/cloud.cfg.d/40_four.cfg": "- no mapping",
                    "etc/cloud/cloud.cfg.d/50_five.cfg": "datasource_list: text",
                    "boot/vmlinuz-6.1.0-10": "",
                    "boot/vmlinuz-6.1.0-8": "",
                }
            )
        )

        facts = await collect(disk, await lay_out(disk))

        assert facts.datasources == ("NoCloud",)
        assert [one.release for one in facts.kernels] == ["6.1.0-8", "6.1.0-9", "6.1.0-10"]

    async def test_kernels_may_have_a_partition_of_their_own(self, make_disk: MakeDisk) -> None:
        on_boot = {name[5:]: text for name, text in FIT.items() if name.startswith("boot/")}
        on_root = {name: text for name, text in FIT.items() if not name.startswith("boot/")}

        found = await check(make_disk(on_root, boot=on_boot), "uefi")

        assert {one.level for one in found} == {Level.OK}

    async def test_firmware_is_told_from_its_boot_loader(self, make_disk: MakeDisk) -> None:
        disk = make_disk(loader=None, code=b"")

        assert await names(disk, Level.FAULT, "uefi") == ["boot loader"]
        assert await names(disk, Level.FAULT, "bios") == ["boot loader"]

    async def test_a_boot_loader_in_one_piece_names_the_console_in_its_program(
        self, make_disk: MakeDisk
    ) -> None:
        tree = without("boot/grub/grub.cfg")

        assert await names(make_disk(tree), Level.WARNING) == ["serial console"]
        assert await names(make_disk(tree, loader=b"MZ\0console=ttyS0\0"), Level.WARNING) == []

    async def test_a_disk_without_a_boot_partition_has_no_loader_for_uefi(
        self, make_disk: MakeDisk
    ) -> None:
        disk = make_disk()
        run("sfdisk", "--quiet", "--part-type", str(disk), "1", "linux")

        assert await names(disk, Level.FAULT) == ["other file systems", "boot loader"]

    async def test_a_partition_behind_the_root_stops_its_growth(self, make_disk: MakeDisk) -> None:
        disk = make_disk()
        run("sfdisk", "--quiet", "--append", str(disk), stdin="start=17MiB, size=1MiB")

        assert await names(disk, Level.WARNING) == ["disk growth"]

    async def test_a_grub_partition_is_no_file_system(self, make_disk: MakeDisk) -> None:
        disk = make_disk()
        run(
            "sfdisk",
            "--quiet",
            "--part-type",
            str(disk),
            "3",
            "21686148-6449-6E6F-744E-656564454649",
        )
        with disk.open("r+b") as stream:
            stream.seek(7 * MIB)
            stream.write(b"core.img")

        assert await names(disk, Level.FAULT) == []

    async def test_what_cannot_be_looked_into_is_refused_by_name(
        self, make_disk: MakeDisk, tmp_path: Path, scratch: Path
    ) -> None:
        blank = tmp_path / "blank.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", str(blank), "1M")
        with pytest.raises(GpudError, match=r"blank\.qcow2: it has no partition table"):
            await check(blank, "uefi")

        disk = make_disk(without("etc/passwd"))
        with pytest.raises(GpudError, match="no system on an ext4 partition"):
            await check(disk, "uefi")

        text = tmp_path / "text"
        text.write_text("no disk")
        with pytest.raises(GpudError, match="neither a qcow2 image nor a raw bootable disk"):
            await check(text, "uefi")
        assert not list(scratch.iterdir())

    async def test_a_damaged_file_system_is_refused(self, make_disk: MakeDisk) -> None:
        disk = make_disk()
        with disk.open("r+b") as stream:
            stream.seek(ROOT_AT + 4096)
            stream.write(b"\xff" * 3 * MIB)

        with pytest.raises(GpudError, match="file system is damaged"):
            await check(disk, "uefi")

    async def test_scratch_space_that_cannot_be_had_is_told(
        self, make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TMPDIR", "/nowhere")

        with pytest.raises(GpudError, match="/nowhere cannot hold a copy") as caught:
            await check(make_disk(), "uefi")
        assert caught.value.code is Code.STATE_UNUSABLE

    async def test_a_program_that_is_missing_is_named_with_its_package(
        self, make_disk: MakeDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        disk = make_disk()
        (tmp_path / "qemu-img").symlink_to(str(shutil.which("qemu-img")))
        monkeypatch.setitem(command._ENVIRONMENT, "PATH", str(tmp_path))

        with pytest.raises(GpudError, match="sfdisk is not installed") as caught:
            await check(disk, "uefi")
        assert caught.value.hint == "apt install fdisk"


class TestRefusal:
    async def test_a_fit_image_passes_with_its_warnings(self, make_disk: MakeDisk) -> None:
        disk = make_disk(without("boot/grub/grub.cfg"))

        assert [one.name for one in await refuse_unfit(disk, "uefi")] == ["serial console"]

    async def test_an_unfit_one_is_refused_with_everything(self, make_disk: MakeDisk) -> None:
        with pytest.raises(GpudError, match="not fit to be cloned") as caught:
            await refuse_unfit(make_disk({**FIT, **LEFT_BEHIND}), "uefi")

        where = {one.where for one in caught.value.problems}
        assert {"machine-id", "SSH host keys", "keys of users"} <= where
        assert "logs" not in where


class TestSeal:
    async def test_a_used_image_becomes_fit_and_nothing_can_be_read_back(
        self, make_disk: MakeDisk, tmp_path: Path, scratch: Path
    ) -> None:
        used, target = make_disk({**FIT, **LEFT_BEHIND}), tmp_path / "sealed.raw"
        before = used.read_bytes()
        assert b"SECRET" in before

        verdicts = await seal(used, target, "uefi")

        assert {one.level for one in verdicts} == {Level.OK}
        assert {one.level for one in await check(target, "uefi")} == {Level.OK}
        assert b"SECRET" not in target.read_bytes()
        assert used.read_bytes() == before
        assert not list(scratch.iterdir())

    async def test_what_is_not_a_trace_stays_as_it_is(
        self, make_disk: MakeDisk, tmp_path: Path
    ) -> None:
        kept = {"etc/ssh/sshd_config": "Port 22\n", "home/build/.profile": "umask 022\n"}
        target = tmp_path / "sealed.raw"

        await seal(make_disk({**FIT, **LEFT_BEHIND, **kept}), target, "uefi")

        files = Ext4(target, ROOT_AT)
        for name, text in kept.items():
            assert await files.read(f"/{name}") == text.encode()
        assert await files.find("/etc/machine-id")
        assert await files.find("/var/log/journal")  # services expect their directories
        assert [one.name for one in await files.entries("/var/log")] == [
            "README",
            "journal",
            "wtmp",
        ]
        assert await files.entries("/var/lib/cloud") == ()
        run("e2fsck", "-f", "-n", f"{target}?offset={ROOT_AT}")

    async def test_in_place_keeps_format_and_mode(
        self, make_disk: MakeDisk, tmp_path: Path
    ) -> None:
        image = tmp_path / "image.qcow2"
        run(
            "qemu-img", "convert", "-O", "qcow2", str(make_disk({**FIT, **LEFT_BEHIND})), str(image)
        )
        image.chmod(0o640)

        await seal(image, image, "uefi")

        assert image.stat().st_mode & 0o777 == 0o640
        assert image.read_bytes()[:4] == b"QFI\xfb"
        assert not faults(await check(image, "uefi"))

    async def test_sealing_twice_is_sealing_once(self, make_disk: MakeDisk, tmp_path: Path) -> None:
        target = tmp_path / "sealed.raw"
        await seal(make_disk({**FIT, **LEFT_BEHIND}), target, "uefi")

        assert {one.level for one in await seal(target, target, "uefi")} == {Level.OK}

    async def test_nothing_is_written_while_a_fault_remains(
        self, make_disk: MakeDisk, tmp_path: Path
    ) -> None:
        disk = make_disk({**without("usr/sbin/sshd"), **LEFT_BEHIND})
        before = disk.read_bytes()

        assert [one.name for one in faults(await seal(disk, disk, "uefi"))] == ["sshd"]
        assert disk.read_bytes() == before
        assert not list(tmp_path.glob("*.new"))

    async def test_an_image_that_guests_stand_on_is_not_replaced(
        self, make_disk: MakeDisk, tmp_path: Path
    ) -> None:
        disk = make_disk()
        (tmp_path / "base").hardlink_to(disk)

        with pytest.raises(GpudError, match="guests may stand on it"):
            await seal(disk, disk, "uefi")

    async def test_what_cannot_be_sealed_is_named(self, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.write_text("no disk")
        with pytest.raises(GpudError, match="text: it is neither"):
            await seal(text, text, "uefi")
