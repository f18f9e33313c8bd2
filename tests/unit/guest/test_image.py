from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gpud import command
from gpud.errors import Code, GpudError, Problem
from gpud.guest import copying, intake
from gpud.guest.image import Image, ImageStore

pytestmark = pytest.mark.real_command("qemu-img", "qemu-io")

MakeImage = Callable[..., Path]
MIB = 2**20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state" / "images"


@pytest.fixture
def store(root: Path) -> ImageStore:
    return ImageStore(root, clock=lambda: 1_700_000_000.0)


def digest_of(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def stored(image: Image) -> set[str]:
    """Everything that a store holding one image called ``base`` consists of."""
    return {".lock", "by-name", image.path.name, image.path.with_suffix(".json").name}


def use(image: Image, directory: Path) -> Path:
    link = directory / f"instance-{os.urandom(4).hex()}"
    link.hardlink_to(image.path)
    return link


async def refusal(store: ImageStore, source: Path, code: Code = Code.IMAGE_INVALID) -> str:
    with pytest.raises(GpudError) as caught:
        await store.add(source, "base")
    assert caught.value.code is code
    return str(caught.value)


class TestAdd:
    async def test_qcow2_is_kept_byte_for_byte_under_its_digest(
        self, store: ImageStore, root: Path, make_image: MakeImage
    ) -> None:
        source = make_image("source", fill=1)

        image = await store.add(source, "base")

        assert image == Image(
            digest=digest_of(source),
            path=root / f"sha256-{digest_of(source)[7:]}.qcow2",
            names=("base",),
            size_bytes=source.stat().st_size,
            virtual_size_bytes=2 * MIB,
            added_at=1_700_000_000.0,
            in_use_by=0,
        )
        assert digest_of(image.path) == image.digest
        assert names(root) == stored(image)

    async def test_files_are_immutable_and_readable_by_all_whatever_the_umask(
        self, store: ImageStore, root: Path, make_image: MakeImage
    ) -> None:
        source = make_image("source")
        before = os.umask(0o077)
        try:
            image = await store.add(source, "base")
        finally:
            os.umask(before)

        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (image.path, root)}
        assert modes == {image.path: 0o444, root: 0o755}

    async def test_raw_disk_is_converted_and_kept_once(
        self, store: ImageStore, root: Path, tmp_path: Path
    ) -> None:
        raw = tmp_path / "disk.raw"
        raw.write_bytes(bytes(510) + b"\x55\xaa" + b"data" * MIB)

        first = await store.add(raw, "base", expected_sha256=digest_of(raw)[7:])
        second = await store.add(raw, "base")

        assert first == second
        assert first.digest == digest_of(first.path)
        assert first.virtual_size_bytes == 4 * MIB + 512
        assert names(root) == stored(first)

    async def test_same_content_under_another_name_only_adds_the_name(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        source = make_image("source")
        first = await store.add(source, "base")
        inode = first.path.stat().st_ino

        second = await store.add(source, "other")

        assert second.names == ("base", "other")
        assert second.path.stat().st_ino == inode

    async def test_name_moves_to_new_content_and_the_old_stays(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        old = await store.add(make_image("old", fill=1), "base")

        with capture_logs() as logs:
            new = await store.add(make_image("new", fill=2), "base")

        assert store.resolve("base") == new
        assert store.resolve(old.digest).names == ()
        assert [entry["previous"] for entry in logs if "moved" in entry["event"]] == [old.digest]

    async def test_expected_checksum_may_be_in_either_case(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        source = make_image("source")

        await store.add(source, "base", expected_sha256=digest_of(source)[7:].upper() + "\n")

    async def test_wrong_checksum_leaves_nothing(
        self, store: ImageStore, root: Path, make_image: MakeImage
    ) -> None:
        with pytest.raises(GpudError, match="as expected"):
            await store.add(make_image("source"), "base", expected_sha256="0" * 64)

        assert names(root) == {".lock", "by-name"}
        assert store.list() == ()

    async def test_hostile_image_is_refused_with_source_and_reason_and_leaves_nothing(
        self, store: ImageStore, root: Path, make_image: MakeImage
    ) -> None:
        hostile = make_image("hostile", "-u", "-b", "/etc/shadow", "-F", "raw")

        text = await refusal(store, hostile)

        assert f"{hostile} is not usable as a base image: it has a backing file" in text
        assert names(root) == {".lock", "by-name"}

    async def test_image_cut_short_is_refused(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        source = make_image("source", fill=1)
        with source.open("r+b") as stream:
            stream.truncate(source.stat().st_size - 65536)

        assert "cut short" in await refusal(store, source)

    async def test_missing_source_is_told(self, store: ImageStore, tmp_path: Path) -> None:
        assert "No such file" in await refusal(store, tmp_path / "gone")

    @pytest.mark.parametrize("name", ["", "../base", ".hidden", "a/b", "sha256:" + "0" * 64])
    async def test_name_that_could_be_a_path_or_digest_is_refused(
        self, store: ImageStore, make_image: MakeImage, name: str
    ) -> None:
        with pytest.raises(GpudError, match="cannot be an image's name"):
            await store.add(make_image("source"), name)

    async def test_progress_is_told(self, store: ImageStore, make_image: MakeImage) -> None:
        source = make_image("source")
        told: list[tuple[int, int]] = []

        await store.add(source, "base", progress=lambda *now: told.append(now))

        assert told[-1] == (source.stat().st_size,) * 2

    async def test_many_at_once(self, store: ImageStore, root: Path, make_image: MakeImage) -> None:
        sources = [make_image(f"source{fill}", fill=fill) for fill in (1, 2)]

        await asyncio.gather(
            *(
                ImageStore(root).add(source, f"{source.name}-{copy}")
                for source in sources
                for copy in (1, 2)
            )
        )

        assert [image.names for image in store.list()] == [
            ("source1-1", "source1-2"),
            ("source2-1", "source2-2"),
        ]
        assert len(names(root)) == 6

    async def test_store_of_another_user_is_refused(
        self,
        store: ImageStore,
        root: Path,
        make_image: MakeImage,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        source = make_image("s")
        root.mkdir(parents=True)
        monkeypatch.setattr(os, "geteuid", lambda: 4711)

        assert "belongs to uid" in await refusal(store, source, Code.STATE_UNUSABLE)

    async def test_the_first_image_is_not_added_as_another_user_than_the_daemons(
        self, root: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, store = make_image("s"), ImageStore(root.parent / "new" / "images")
        (root.parent / "new").mkdir(parents=True)
        monkeypatch.setattr(os, "geteuid", lambda: 4711)

        assert "belongs to uid" in await refusal(store, source, Code.STATE_UNUSABLE)
        assert not (root.parent / "new" / "images").exists()

    async def test_full_disk_is_told_and_leaves_nothing(
        self,
        store: ImageStore,
        root: Path,
        make_image: MakeImage,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(copying, "_write_or_leave_hole", full)

        assert "No space left" in await refusal(store, make_image("s"), Code.STATE_UNUSABLE)
        assert names(root) == {".lock", "by-name"}


class TestJudge:
    async def test_what_passed_a_judge_is_sealed_and_the_judge_sees_our_copy(
        self, store: ImageStore, root: Path, make_image: MakeImage
    ) -> None:
        seen: list[Path] = []

        async def judge(copy: Path) -> None:
            seen.append(copy)

        image = await store.add(make_image("source"), "base", judge=judge)

        assert image.sealed
        assert store.resolve("base").sealed
        assert [copy.is_relative_to(root) for copy in seen] == [True]

    async def test_what_nobody_looked_at_becomes_sealed_by_being_added_again(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        source = make_image("source")

        async def judge(_: Path) -> None:
            pass

        assert not (await store.add(source, "base")).sealed
        assert (await store.add(source, "base", judge=judge)).sealed
        assert (await store.add(source, "base")).sealed

    async def test_a_refusal_names_the_source_and_leaves_nothing(
        self, store: ImageStore, root: Path, make_image: MakeImage
    ) -> None:
        async def judge(_: Path) -> None:
            problem = Problem("SSH host keys", "there are some")
            raise GpudError(Code.IMAGE_INVALID, "it is not sealed", problems=[problem])

        source = make_image("source")
        with pytest.raises(GpudError, match="it is not sealed") as caught:
            await store.add(source, "base", judge=judge)

        assert f"{source} is not usable" in str(caught.value)
        assert "SSH host keys: there are some" in str(caught.value)
        assert names(root) == {".lock", "by-name"}

    async def test_records_from_before_anybody_looked_are_read(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        image = await store.add(make_image("source"), "base")
        sidecar = image.path.with_suffix(".json")
        record = json.loads(sidecar.read_bytes())
        del record["sealed"]
        sidecar.write_text(json.dumps(record))

        assert store.resolve("base") == image

    async def test_a_verified_image_keeps_its_seal(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        async def judge(_: Path) -> None:
            pass

        image = await store.add(make_image("source"), "base", judge=judge)
        os.utime(image.path, ns=(0, 0))

        assert (await store.verify("base")).sealed


class TestInterruption:
    async def test_cancelled_addition_leaves_nothing(
        self, store: ImageStore, root: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checking = asyncio.Event()

        async def hang(*_: object, **__: object) -> None:
            checking.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(command, "run", hang)
        task = asyncio.create_task(store.add(make_image("source"), "base"))
        await checking.wait()
        assert any(name.startswith(".incoming-") for name in names(root))

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert names(root) == {".lock", "by-name"}

    async def test_sweep_takes_what_a_crash_left_but_not_what_is_under_way(
        self, store: ImageStore, root: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = await store.add(make_image("kept"), "base")
        (root / ".incoming-crashed").mkdir()
        (root / ".incoming-crashed" / "copy").write_bytes(b"half")
        (root / f"sha256-{'0' * 64}.json").write_bytes(b"{}")
        (root / f"sha256-{'1' * 64}.json.new").write_bytes(b"{")
        checking, go_on = asyncio.Event(), asyncio.Event()
        really_run = command.run

        async def wait_and_run(*argv: str | Path, timeout_s: float, ok: tuple[int, ...]) -> object:
            checking.set()
            await go_on.wait()
            return await really_run(*argv, timeout_s=timeout_s, ok=ok)

        monkeypatch.setattr(command, "run", wait_and_run)
        task = asyncio.create_task(store.add(make_image("new", fill=1), "new"))
        await checking.wait()

        store.sweep()

        assert len(names(root) - stored(kept)) == 1  # the one under way
        go_on.set()
        assert (await task).names == ("new",)
        assert store.resolve("base") == kept

    async def test_crash_at_any_rename_leaves_the_store_usable(
        self, store: ImageStore, root: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = await store.add(make_image("old", fill=1), "base")
        source = make_image("new", fill=2)
        really_replace = Path.replace

        for survived in range(3):  # the record, the image, the name
            renames = 0

            def replace(path: Path, target: Path, limit: int = survived) -> Path:
                nonlocal renames
                if renames == limit:
                    raise KeyboardInterrupt
                renames += 1
                return really_replace(path, target)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", replace)
                with pytest.raises(KeyboardInterrupt):
                    store._publish(await candidate(source, root), "base")

            assert store.resolve("base") == old

        new = await store.add(source, "base")
        assert store.resolve("base") == new
        assert names(root) == stored(old) | stored(new)


async def candidate(source: Path, root: Path) -> intake.Candidate:
    copy = root / f".incoming-{os.urandom(4).hex()}"
    copy.mkdir()
    return await intake.take_in(source, copy, None, None)


class TestResolve:
    async def test_by_name_and_by_digest(self, store: ImageStore, make_image: MakeImage) -> None:
        image = await store.add(make_image("source"), "base")

        assert store.resolve("base") == store.resolve(image.digest) == image

    async def test_reads_no_content(
        self, store: ImageStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image = await store.add(make_image("source"), "base")
        monkeypatch.setattr(copying, "_regular_file", lambda _: pytest.fail("read"))

        assert store.resolve("base") == image

    @pytest.mark.parametrize("wanted", ["nothing", "../state", "sha256:" + "0" * 64])
    async def test_unknown_image_is_told(
        self, store: ImageStore, make_image: MakeImage, wanted: str
    ) -> None:
        await store.add(make_image("source"), "base")

        with pytest.raises(GpudError) as caught:
            store.resolve(wanted)

        assert caught.value.code is Code.IMAGE_INVALID
        assert wanted in str(caught.value)

    def test_store_that_was_never_used_is_empty(self, store: ImageStore) -> None:
        store.sweep()

        assert store.list() == ()
        with pytest.raises(GpudError, match="there is no image 'base'"):
            store.resolve("base")

    @pytest.mark.parametrize(
        ("damage", "told"),
        [
            (Path.unlink, "its file is missing"),
            (lambda path: os.truncate(path, 100), "its file has 100 bytes"),
            (lambda path: os.utime(path, ns=(0, 0)), "was written to after it was added"),
            (lambda path: path.with_suffix(".json").unlink(), "its record is missing"),
            (
                lambda path: path.with_suffix(".json").write_bytes(b'{"a'),
                "record is missing or unr",
            ),
            (lambda path: path.with_suffix(".json").write_bytes(b'{"a": 1}'), "or unreadable"),
        ],
    )
    async def test_damage_is_told_listed_and_repaired_by_adding_again(
        self,
        store: ImageStore,
        make_image: MakeImage,
        damage: Callable[[Path], object],
        told: str,
    ) -> None:
        source = make_image("source")
        image = await store.add(source, "base")
        damage(image.path)

        with pytest.raises(GpudError, match=told) as caught:
            store.resolve("base")

        assert caught.value.code is Code.IMAGE_INVALID
        assert [told in listed.fault for listed in store.list()] == [True]
        assert await store.add(source, "base") == image

    async def test_foreign_files_are_no_images(
        self, store: ImageStore, root: Path, make_image: MakeImage
    ) -> None:
        image = await store.add(make_image("source"), "base")
        (root / "notes.txt").write_text("an operator's")
        (root / "by-name" / "plain").write_text("file")
        (root / "by-name" / "elsewhere").symlink_to("/etc/passwd")

        assert store.list() == (image,)


class TestVerify:
    async def test_intact_image_passes(self, store: ImageStore, make_image: MakeImage) -> None:
        image = await store.add(make_image("source"), "base")

        assert await store.verify("base") == image

    async def test_intact_image_whose_record_is_lost_becomes_usable(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        image = await store.add(make_image("source"), "base")
        image.path.with_suffix(".json").unlink()

        assert await store.verify("base") == image
        assert store.resolve("base") == image

    async def test_changed_bytes_are_found_even_behind_an_equal_time(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        image = await store.add(make_image("source", fill=1), "base")
        before = image.path.stat()
        image.path.chmod(0o644)
        with image.path.open("r+b") as stream:
            stream.seek(-10, os.SEEK_END)
            stream.write(b"X")
        os.utime(image.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert store.resolve("base").fault == ""

        with pytest.raises(GpudError, match="has changed") as caught:
            await store.verify("base")

        assert caught.value.code is Code.IMAGE_INVALID

    async def test_image_dropped_in_by_hand_is_examined_like_any_other(
        self, store: ImageStore, root: Path, make_image: MakeImage
    ) -> None:
        await store.add(make_image("source"), "base")
        for content, reason in (
            (make_image("hostile", "-u", "-b", "/x", "-F", "raw").read_bytes(), "backing file"),
            (bytes(510) + b"\x55\xaa", "not a qcow2 image"),
        ):
            sha256 = hashlib.sha256(content).hexdigest()
            (root / f"sha256-{sha256}.qcow2").write_bytes(content)

            with pytest.raises(GpudError, match=reason):
                await store.verify(f"sha256:{sha256}")


class TestRemove:
    async def test_last_name_takes_the_content_with_it(
        self, store: ImageStore, root: Path, make_image: MakeImage
    ) -> None:
        await store.add(make_image("source"), "base")

        store.remove("base")

        assert names(root) == {".lock", "by-name"}
        assert names(root / "by-name") == set()

    async def test_another_name_keeps_the_content_even_in_use(
        self, store: ImageStore, tmp_path: Path, make_image: MakeImage
    ) -> None:
        source = make_image("source")
        await store.add(source, "base")
        image = await store.add(source, "other")
        use(image, tmp_path)

        store.remove("base")

        assert store.resolve("other").names == ("other",)

    async def test_image_in_use_stays_until_its_last_instance_ends(
        self, store: ImageStore, tmp_path: Path, make_image: MakeImage
    ) -> None:
        image = await store.add(make_image("source"), "base")
        links = [use(image, tmp_path), use(image, tmp_path)]
        assert store.list()[0].in_use_by == 2

        for wanted in ("base", image.digest):
            with pytest.raises(GpudError, match=r"in use by 2 instance\(s\)") as caught:
                store.remove(wanted)
            assert caught.value.code is Code.IMAGE_IN_USE

        for link in links:
            link.unlink()
        store.remove("base")
        assert store.list() == ()

    async def test_digest_takes_all_names(self, store: ImageStore, make_image: MakeImage) -> None:
        source = make_image("source")
        await store.add(source, "base")
        image = await store.add(source, "other")

        store.remove(image.digest)

        assert store.list() == ()

    async def test_superseded_image_is_removed_by_digest(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        old = await store.add(make_image("old", fill=1), "base")
        new = await store.add(make_image("new", fill=2), "base")
        assert store.list() == (new, store.resolve(old.digest))

        store.remove(old.digest)

        assert store.list() == (new,)

    async def test_damaged_image_can_be_removed(
        self, store: ImageStore, make_image: MakeImage
    ) -> None:
        image = await store.add(make_image("source"), "base")
        image.path.unlink()

        store.remove("base")

        assert store.list() == ()

    async def test_unknown_image_is_told(self, store: ImageStore, make_image: MakeImage) -> None:
        await store.add(make_image("source"), "base")

        for wanted in ("other", "sha256:" + "0" * 64):
            with pytest.raises(GpudError, match="no image"):
                store.remove(wanted)
