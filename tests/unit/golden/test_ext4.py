"""What debugfs is asked, on a real file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpud.errors import Code, GpudError
from gpud.golden import ext4
from gpud.golden.ext4 import Entry, Ext4
from tests.unit.golden.conftest import MIB, ROOT_AT, TOOLS, MakeDisk

pytestmark = pytest.mark.real_command(*TOOLS)


async def test_a_link_out_of_the_file_system_leads_nowhere(make_disk: MakeDisk) -> None:
    files = Ext4(make_disk({"etc/passwd": b"-> /etc/passwd", "out": b"-> /proc"}), ROOT_AT)

    assert await files.read("/etc/passwd") is None
    assert await files.entries("/out/self") == ()
    assert await files.find("/etc/passwd") == Entry("/etc/passwd", "link", 11)


async def test_a_file_that_is_too_large_is_not_read(
    make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Ext4(make_disk({"large": "12345", "small": "1234"}), ROOT_AT)
    monkeypatch.setattr(ext4, "_FILE_LIMIT_BYTES", 4)

    assert await files.read("/large") is None
    assert await files.read("/small") == b"1234"
    assert await files.read("/none") is None


async def test_names_are_taken_as_they_are(make_disk: MakeDisk) -> None:
    names = {'a "b" c', "ä", "x;y", "$(z)", "-r"}
    files = Ext4(make_disk({f"d/{name}": "" for name in names}), ROOT_AT)

    found = await files.entries("/d")
    assert {one.name for one in found} == names
    await files.remove(found)
    assert await files.entries("/d") == ()


async def test_a_file_system_that_is_none_is_told(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.write_bytes(bytes(MIB))

    with pytest.raises(GpudError, match="its file system cannot be read"):
        await Ext4(nothing).entries("/")


@pytest.mark.parametrize("name", ["log\rdump p pwned\r", "tab\tbed", "\x7f", "new\nline"])
async def test_a_name_that_would_end_a_request_is_refused(make_disk: MakeDisk, name: str) -> None:
    files = Ext4(make_disk({f"d/{name}/in it": ""}), ROOT_AT)

    with pytest.raises(GpudError, match=r"it holds a (path|name)") as refused:
        await files.walk("/d")
    assert refused.value.code is Code.IMAGE_INVALID


async def test_a_path_that_is_longer_than_debugfs_reads_at_once_is_refused(
    make_disk: MakeDisk, tmp_path: Path
) -> None:
    """What stands behind the first 8,191 bytes would be taken for a request of its own."""
    files = Ext4(make_disk({"secret": "of the image"}), ROOT_AT)
    stolen = tmp_path / "written by the image"
    beginning = 'ls -p "'
    path = "x" * (8191 - len(beginning)) + f"dump secret {stolen.name}"

    with pytest.raises(GpudError, match="cannot be asked for safely"):
        await files.entries(path)
    assert not stolen.exists()


async def test_the_longest_path_that_linux_takes_can_be_asked_for(make_disk: MakeDisk) -> None:
    files = Ext4(make_disk({"a": ""}), ROOT_AT)

    assert await files.entries("/" + "ö/" * 1365) == ()
