from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from gpud import command
from gpud.errors import Code, GpudError
from gpud.guest import qcow2

pytestmark = pytest.mark.real_command("qemu-img", "qemu-io")

MakeImage = Callable[..., Path]


@pytest.fixture
def no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as a QEMU program would open the image."""

    async def run(*argv: object, **_: object) -> None:
        pytest.fail(f"started {argv}")

    monkeypatch.setattr(command, "run", run)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def refusal(path: Path) -> str:
    with pytest.raises(GpudError) as caught:
        qcow2.judge(path)
    assert caught.value.code is Code.IMAGE_INVALID
    return str(caught.value)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_self_contained_qcow2_of_both_versions_is_known(make_image: MakeImage, compat: str) -> None:
    assert qcow2.judge(make_image("a", "-o", f"compat={compat}")) is qcow2.Format.QCOW2


def test_raw_disk_is_known_by_its_boot_signature(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(510) + b"\x55\xaa" + bytes(512))

    assert qcow2.judge(raw) is qcow2.Format.RAW


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.usefixtures("no_qemu")
def test_backing_file_is_refused_before_any_qemu_program_runs(
    make_image: MakeImage, compat: str
) -> None:
    hostile = make_image("h", "-o", f"compat={compat}", "-u", "-b", "/etc/shadow", "-F", "raw")

    assert "backing file" in refusal(hostile)


@pytest.mark.usefixtures("no_qemu")
def test_external_data_file_is_refused_before_any_qemu_program_runs(make_image: MakeImage) -> None:
    assert "another file" in refusal(make_image("h", "-o", "data_file=elsewhere.raw"))


@pytest.mark.usefixtures("no_qemu")
def test_encrypted_image_is_refused(make_image: MakeImage) -> None:
    encrypted = make_image(
        "e", "--object", "secret,id=key,data=topsecret", "-o",
        "encrypt.format=aes,encrypt.key-secret=key",
    )  # fmt: skip

    assert "encrypted" in refusal(encrypted)


@pytest.mark.usefixtures("no_qemu")
def test_image_marked_corrupt_is_refused(make_image: MakeImage) -> None:
    image = make_image("a")
    overwrite(image, 72, struct.pack(">Q", 2))

    assert "marked corrupt" in refusal(image)


@pytest.mark.usefixtures("no_qemu")
def test_other_qcow_versions_are_refused(make_image: MakeImage) -> None:
    future = make_image("future")
    overwrite(future, 4, struct.pack(">I", 4))

    assert "version is 4" in refusal(future)
    assert "version is 1" in refusal(make_image("past", image_format="qcow"))


@pytest.mark.parametrize("image_format", ["vmdk", "vdi", "vhdx", "vpc", "qed", "raw"])
@pytest.mark.usefixtures("no_qemu")
def test_every_other_format_is_refused(make_image: MakeImage, image_format: str) -> None:
    assert "neither a qcow2" in refusal(make_image("other", image_format=image_format))


@pytest.mark.parametrize(
    "content", [b"", b"QFI\xfb\0\0\0\3", b"\x1f\x8b" + bytes(1000), b"#!/bin/sh"]
)
@pytest.mark.usefixtures("no_qemu")
def test_things_that_are_no_disk_are_refused(tmp_path: Path, content: bytes) -> None:
    thing = tmp_path / "thing"
    thing.write_bytes(content)

    assert "neither a qcow2" in refusal(thing)


async def test_info_of_an_image_without_backing_file(make_image: MakeImage) -> None:
    assert await qcow2.info(make_image("a", size="3M")) == qcow2.Info(3 * 2**20, None)


async def test_info_refuses_what_qemu_cannot_open(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"QFI\xfb" + bytes(600))

    with pytest.raises(GpudError, match="QEMU cannot open it") as caught:
        await qcow2.info(tmp_path / "x")

    assert caught.value.code is Code.IMAGE_INVALID


async def test_check_passes_a_sound_image(make_image: MakeImage) -> None:
    await qcow2.check(make_image("a", fill=7))


async def test_check_finds_an_image_cut_short(make_image: MakeImage) -> None:
    image = make_image("a", fill=7)
    with image.open("r+b") as stream:
        stream.truncate(image.stat().st_size - 65536)

    with pytest.raises(GpudError, match="damaged or cut short") as caught:
        await qcow2.check(image)

    assert caught.value.code is Code.IMAGE_INVALID


async def test_check_passes_leaked_clusters(make_image: MakeImage) -> None:
    image = make_image("a", fill=7)
    # Forget the mapping of the data, whose cluster stays counted as used.
    l1_table = struct.unpack(">Q", image.read_bytes()[40:48])[0]
    overwrite(image, l1_table, bytes(8))
    done = await command.run("qemu-img", "check", "-f", "qcow2", image, timeout_s=10, ok=(3,))
    assert "leaked" in done.stdout

    await qcow2.check(image)


async def test_raw_disk_is_converted_to_the_same_bytes_each_time(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"boot" * 65536 + bytes(2**20))

    for name in ("one", "two"):
        await qcow2.convert_raw(raw, tmp_path / name)

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (await qcow2.info(tmp_path / "one")).virtual_size_bytes == raw.stat().st_size


async def test_overlay_names_its_base_relatively_and_writes_in_pages(
    make_image: MakeImage, tmp_path: Path
) -> None:
    make_image("base")

    await qcow2.create_overlay(tmp_path / "disk", backing_file="base", size_bytes=2**40)

    assert await qcow2.info(tmp_path / "disk") == qcow2.Info(2**40, "base")
    told = await command.run("qemu-img", "info", "-f", "qcow2", tmp_path / "disk", timeout_s=10)
    assert "extended l2: true" in told.stdout
    assert "lazy refcounts: false" in told.stdout
    assert (tmp_path / "disk").stat().st_size < 2**20
