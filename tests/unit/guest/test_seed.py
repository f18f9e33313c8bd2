from __future__ import annotations

import io
import stat
import struct
from pathlib import Path

import pytest
from pycdlib import PyCdlib

from gpud import command
from gpud.errors import Code, GpudError
from gpud.guest.seed import VOLUME_LABEL, write_seed

FILES = {
    "user-data": b"#cloud-config\n" + b"x" * 500 * 1024,
    "meta-data": b"instance-id: i-1\n",
    "network-config": b"version: 2\r\n\xff\x00",
}


def read(path: Path, kind: str, name: str) -> bytes:
    image = PyCdlib()
    image.open(str(path))
    content = io.BytesIO()
    image.get_file_from_iso_fp(content, **{kind: f"/{name}"})
    image.close()
    return content.getvalue()


@pytest.mark.parametrize("kind", ["rr_path", "joliet_path"])
async def test_files_have_their_exact_names_and_bytes(tmp_path: Path, kind: str) -> None:
    seed = tmp_path / "seed.iso"

    await write_seed(seed, FILES)

    assert {name: read(seed, kind, name) for name in FILES} == FILES


async def test_volume_label_is_the_one_that_nocloud_looks_for(tmp_path: Path) -> None:
    seed = tmp_path / "seed.iso"

    await write_seed(seed, FILES)

    # ECMA-119 8.4.7: the volume identifier, in the descriptor at sector 16.
    assert seed.read_bytes()[16 * 2048 + 40 :][:32] == b"cidata".ljust(32)
    assert VOLUME_LABEL == "cidata"


@pytest.mark.real_command("xorriso")
async def test_another_program_reads_the_same_tree(tmp_path: Path) -> None:
    seed = tmp_path / "seed.iso"
    await write_seed(seed, FILES)

    listed = await command.run(
        "xorriso", "-osirrox", "on", "-indev", f"stdio:{seed}",
        "-lsl", "/", "--", "-extract", "/", tmp_path / "out",
        timeout_s=20,
    )  # fmt: skip

    extracted = {entry.name: entry.read_bytes() for entry in tree(tmp_path / "out")}
    assert extracted == FILES
    assert listed.stdout.count("-r--------") == 3
    assert "Volume id    : 'cidata'" in listed.stderr


def tree(directory: Path) -> list[Path]:
    return list(directory.iterdir())


async def test_seed_is_secret_and_replaces_an_older_one(tmp_path: Path) -> None:
    seed = tmp_path / "seed.iso"
    seed.write_bytes(b"old")
    seed.chmod(0o644)

    await write_seed(seed, {"meta-data": b"new"})

    assert stat.S_IMODE(seed.stat().st_mode) == 0o600
    assert read(seed, "rr_path", "meta-data") == b"new"
    assert tree(tmp_path) == [seed]


async def test_same_input_differs_in_dates_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)

    await write_seed(tmp_path / "one", FILES)
    await write_seed(tmp_path / "two", dict(reversed(FILES.items())))

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


async def test_image_size_is_what_its_descriptor_says(tmp_path: Path) -> None:
    seed = tmp_path / "seed.iso"

    await write_seed(seed, FILES)

    blocks = struct.unpack_from("<I", seed.read_bytes(), 16 * 2048 + 80)[0]
    assert seed.stat().st_size == blocks * 2048


async def test_unwritable_place_is_told_without_any_content(tmp_path: Path) -> None:
    with pytest.raises(GpudError, match="No such file or directory") as caught:
        await write_seed(tmp_path / "gone" / "seed.iso", FILES)

    assert caught.value.code is Code.STATE_UNUSABLE
    assert "cloud-config" not in str(caught.value)
