from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gpud import command
from gpud.errors import Code, GpudError
from gpud.guest import qcow2
from gpud.guest.disk import InstanceFiles, clone, remove
from gpud.guest.image import Image, ImageStore

pytestmark = pytest.mark.real_command("qemu-img", "qemu-io")

MakeImage = Callable[..., Path]
ID = "i-0123456789abcdef"


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def store(state_dir: Path) -> ImageStore:
    return ImageStore(state_dir / "images")


@pytest.fixture
async def image(store: ImageStore, make_image: MakeImage) -> Image:
    return await store.add(make_image("source", fill=1), "base")


@pytest.fixture
def files(state_dir: Path) -> InstanceFiles:
    return InstanceFiles.of(state_dir, ID)


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_as_guest(path: Path) -> bytes:
    """Change a disk, and return all of it."""
    with path.open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        stream.write(b"what the guest wrote")
    return path.read_bytes()


class TestNames:
    def test_all_files_are_in_the_directory_named_after_the_instance(
        self, files: InstanceFiles
    ) -> None:
        paths = {files.base, files.disk, files.seed, files.nvram}

        assert len(paths) == 4
        assert {path.parent for path in paths} == {files.directory}
        assert files.directory.name == ID

    @pytest.mark.parametrize(
        "upstream_id",
        ["", "..", "../images", "i-0123456789abcde/", ID + "\n", "/" + ID, ID.upper()],
    )
    def test_no_path_is_made_from_anything_but_an_upstream_id(
        self, state_dir: Path, upstream_id: str
    ) -> None:
        with pytest.raises(ValueError, match="not an upstream_id"):
            InstanceFiles.of(state_dir, upstream_id)


class TestClone:
    async def test_disk_is_an_overlay_of_the_image_with_the_size_asked_for(
        self, files: InstanceFiles, image: Image
    ) -> None:
        await clone(files, image, 10)

        assert await qcow2.info(files.disk) == qcow2.Info(10 * 2**30, "base.qcow2")
        assert files.base.samefile(image.path)
        assert names(files.directory) == {"base.qcow2", "disk.qcow2"}

    async def test_guest_sees_the_image_and_cannot_change_it(
        self, files: InstanceFiles, image: Image
    ) -> None:
        before = image.path.read_bytes()
        await clone(files, image, 1)

        for act in ("read -P 1 0 64k", "write -P 2 4k 4k", "read -P 1 0 4k", "read -P 2 4k 4k"):
            done = await command.run("qemu-io", "-f", "qcow2", "-c", act, files.disk, timeout_s=20)
            assert "failed" not in done.stdout

        assert image.path.read_bytes() == before

    async def test_only_qemu_may_pass_and_only_the_owner_may_read_the_disk(
        self, files: InstanceFiles, image: Image
    ) -> None:
        before = os.umask(0o077)
        try:
            await clone(files, image, 1)
        finally:
            os.umask(before)

        assert [mode(path) for path in (files.directory.parent, files.directory)] == [0o711] * 2
        assert mode(files.base) == 0o444
        assert mode(files.disk) == 0o600

    async def test_image_counts_the_instance_until_it_is_removed(
        self, files: InstanceFiles, image: Image, store: ImageStore
    ) -> None:
        await clone(files, image, 1)
        assert store.resolve("base").in_use_by == 1

        await remove(files)
        assert store.resolve("base").in_use_by == 0

    async def test_repeating_never_touches_a_disk(self, files: InstanceFiles, image: Image) -> None:
        await clone(files, image, 1)
        written = write_as_guest(files.disk)

        await clone(files, image, 1)

        assert files.disk.read_bytes() == written

    @pytest.mark.parametrize("point", ["create_overlay", "info", "_finish"])
    async def test_stop_at_any_point_is_made_good_by_repeating(
        self, files: InstanceFiles, image: Image, monkeypatch: pytest.MonkeyPatch, point: str
    ) -> None:
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(f"gpud.guest.{'disk' if point == '_finish' else 'qcow2'}.{point}", stop)
            with pytest.raises(KeyboardInterrupt):
                await clone(files, image, 1)
        assert not files.disk.exists()

        await clone(files, image, 1)

        assert await qcow2.info(files.disk) == qcow2.Info(2**30, "base.qcow2")
        assert names(files.directory) == {"base.qcow2", "disk.qcow2"}

    async def test_half_made_overlay_is_made_anew(self, files: InstanceFiles, image: Image) -> None:
        files.directory.mkdir(parents=True)
        (files.directory / "disk.qcow2.new").write_bytes(b"half")

        await clone(files, image, 1)

        await qcow2.check(files.disk)

    async def test_base_of_an_order_that_got_no_further_is_replaced(
        self, files: InstanceFiles, image: Image
    ) -> None:
        files.directory.mkdir(parents=True)
        files.base.write_bytes(b"other")

        await clone(files, image, 1)

        assert files.base.samefile(image.path)

    async def test_disk_of_another_image_is_refused_and_kept(
        self, files: InstanceFiles, image: Image, store: ImageStore, make_image: MakeImage
    ) -> None:
        await clone(files, image, 1)
        written = write_as_guest(files.disk)
        other = await store.add(make_image("other", fill=2), "other")

        with pytest.raises(GpudError, match="stands on another image") as caught:
            await clone(files, other, 1)

        assert caught.value.code is Code.GUEST_FAILED
        assert files.disk.read_bytes() == written
        assert files.base.samefile(image.path)

    async def test_storage_smaller_than_the_image_is_refused(
        self, files: InstanceFiles, store: ImageStore, make_image: MakeImage
    ) -> None:
        image = await store.add(make_image("large", size="1025M"), "large")

        with pytest.raises(GpudError, match=r"1 GiB is too small .* 1\.00 GiB") as caught:
            await clone(files, image, 1)

        assert caught.value.code is Code.CONFIG_INVALID
        assert not files.directory.exists()

    async def test_overlay_that_came_out_wrong_is_not_used(
        self, files: InstanceFiles, image: Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        really_create = qcow2.create_overlay

        async def create(path: Path, *, backing_file: str, size_bytes: int) -> None:
            await really_create(path, backing_file=backing_file, size_bytes=size_bytes // 2)

        monkeypatch.setattr(qcow2, "create_overlay", create)

        with pytest.raises(GpudError, match="not with the size") as caught:
            await clone(files, image, 1)

        assert caught.value.code is Code.GUEST_FAILED
        assert not files.disk.exists()

    async def test_image_of_another_user_is_told(
        self, files: InstanceFiles, image: Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", refuse)  # fs.protected_hardlinks

        with pytest.raises(GpudError, match="protected_hardlinks") as caught:
            await clone(files, image, 1)

        assert caught.value.code is Code.STATE_UNUSABLE

    @pytest.mark.parametrize(("number", "hint"), [(28, True), (5, False)])
    async def test_failing_disk_is_told_with_the_instance(
        self,
        files: InstanceFiles,
        image: Image,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        hint: bool,
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("gpud.guest.disk.commit", fail)

        with pytest.raises(GpudError, match=ID) as caught:
            await clone(files, image, 1)

        assert caught.value.code is Code.STATE_UNUSABLE
        assert ("free disk space" in caught.value.hint) is hint

    async def test_directory_that_is_a_symlink_is_refused(
        self, files: InstanceFiles, image: Image, tmp_path: Path
    ) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        files.directory.parent.mkdir()
        files.directory.symlink_to(elsewhere)

        with pytest.raises(GpudError, match="File exists"):
            await clone(files, image, 1)

        assert names(elsewhere) == set()


class TestRemove:
    async def test_everything_of_the_instance_goes_and_nothing_else(
        self, files: InstanceFiles, image: Image, state_dir: Path
    ) -> None:
        other = InstanceFiles.of(state_dir, "i-fedcba9876543210")
        for each in (files, other):
            await clone(each, image, 1)
        for path in (files.seed, files.nvram):
            path.write_bytes(b"x")
        for leftover in ("seed.iso.new", "disk.qcow2.new"):
            (files.directory / leftover).write_bytes(b"x")

        await remove(files)

        assert names(state_dir / "instances") == {other.directory.name}
        assert names(other.directory) == {"base.qcow2", "disk.qcow2"}
        assert image.path.exists()

    async def test_what_is_gone_already_is_no_matter(
        self, files: InstanceFiles, image: Image
    ) -> None:
        await remove(files)
        await clone(files, image, 1)
        files.disk.unlink()

        for _ in range(2):
            await remove(files)

        assert not files.directory.exists()

    async def test_foreign_file_stays_and_is_told(self, files: InstanceFiles, image: Image) -> None:
        await clone(files, image, 1)
        (files.directory / "notes.txt").write_text("an operator's")

        with capture_logs() as logs:
            await remove(files)

        assert logs[0]["names"] == ["notes.txt"]
        assert names(files.directory) == {"notes.txt"}

    async def test_symlinks_are_not_followed(self, files: InstanceFiles, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.mkdir()
        (victim / "disk.qcow2").write_bytes(b"precious")
        files.directory.parent.mkdir(parents=True)
        files.directory.symlink_to(victim)

        with pytest.raises(GpudError, match="cannot be changed"):
            await remove(files)

        files.directory.unlink()
        files.directory.mkdir()
        files.disk.symlink_to(victim / "disk.qcow2")
        await remove(files)
        assert (victim / "disk.qcow2").read_bytes() == b"precious"
        assert not files.directory.exists()
