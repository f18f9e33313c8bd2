"""The children are real, and so are the files they block on: FIFOs, and the kernel's own."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from pathlib import Path

import pytest

from gpud import command
from gpud.errors import Code, GpudError
from gpud.host.sysfs import Sysfs, SysfsError, attribute
from gpud.model import PciAddress
from tests.unit.fakes.orders import until_reaped

GPU = PciAddress.parse("0000:41:00.0")
FILE = Path("file")

children = pytest.mark.real_command("dd", "od")


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


async def refusal(sysfs: Sysfs, path: Path, text: str, timeout_s: float = 10) -> SysfsError:
    with pytest.raises(SysfsError) as caught:
        await sysfs.write(path, text, timeout_s)
    assert caught.value.code is Code.GPU_UNUSABLE
    return caught.value


@children
async def test_a_text_arrives_whole_and_in_one_write(sysfs: Sysfs, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    reader = os.open(tmp_path / FILE, os.O_RDONLY | os.O_NONBLOCK)

    await sysfs.write(FILE, "0000:41:00.0\n", 10)

    assert os.read(reader, 4096) == b"0000:41:00.0\n"
    os.close(reader)


@children
async def test_a_newline_alone_is_a_write(sysfs: Sysfs, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("x")

    await sysfs.write(FILE, "\n", 10)

    assert (tmp_path / FILE).read_text() == "\n"


async def test_an_empty_text_is_a_mistake(sysfs: Sysfs) -> None:
    with pytest.raises(ValueError, match="nothing to write"):
        await sysfs.write(FILE, "", 10)


@children
async def test_a_hostile_text_is_no_command(sysfs: Sysfs, tmp_path: Path) -> None:
    (tmp_path / "of=x '$(touch pwned)").touch()

    await sysfs.write(Path("of=x '$(touch pwned)"), "`touch pwned`", 10)

    assert [file.name for file in tmp_path.iterdir()] == ["of=x '$(touch pwned)"]


@children
async def test_a_missing_file_is_not_made(sysfs: Sysfs, tmp_path: Path) -> None:
    error = await refusal(sysfs, FILE, "on\n")

    assert error.errno == errno.ENOENT
    assert error.detail == (
        f"'on' could not be written to {tmp_path / FILE}: No such file or directory (ENOENT)"
    )
    assert not (tmp_path / FILE).exists()


@children
async def test_the_kernels_own_refusal_is_told() -> None:
    refused = await refusal(Sysfs(Path("/proc/self")), Path("oom_score_adj"), "5000")

    assert refused.errno == errno.EINVAL
    assert "Invalid argument (EINVAL)" in refused.detail


@children
async def test_a_directory_is_no_file(sysfs: Sysfs, tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()

    assert (await refusal(sysfs, FILE, "1")).errno == errno.EISDIR


@children
async def test_a_refusal_in_unknown_words_is_an_input_output_error(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*_: object, **__: object) -> command.Completed:
        return command.Completed("", "dd: something new", 1)

    monkeypatch.setattr(command, "run", run)

    error = await refusal(sysfs, FILE, "1")

    assert error.errno == errno.EIO
    assert error.detail.endswith("something new (EIO)")


@children
async def test_a_write_that_hangs_is_killed_in_time(sysfs: Sysfs, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)  # opening it waits for a reader
    started = time.monotonic()

    error = await refusal(sysfs, FILE, "1", timeout_s=0.05)

    assert error.errno is None
    assert "'1' could not be written to" in error.detail
    assert "did not end within 0.05 s and was killed" in error.detail
    assert time.monotonic() - started < 2


@children
async def test_a_write_that_hangs_does_not_hold_up_others(sysfs: Sysfs, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    (tmp_path / "other").touch()
    hanging = asyncio.create_task(sysfs.write(FILE, "1", 10))

    await sysfs.write(Path("other"), "1", 10)

    assert not hanging.done()
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


@children
async def test_a_child_that_cannot_be_killed_is_left_behind(
    sysfs: Sysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / FILE)
    stuck: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda pid, _: stuck.append(pid))  # as if inside the kernel
    monkeypatch.setattr(command, "_KILL_GRACE_S", 0.01)

    error = await refusal(sysfs, FILE, "1", timeout_s=0.05)

    assert "has not gone away yet (stuck inside the kernel?)" in error.detail
    os.kill(stuck[0], 9)
    await until_reaped()


@children
async def test_config_header_is_64_bytes_of_any_value(sysfs: Sysfs, tmp_path: Path) -> None:
    config = bytes(range(256)) * 16
    (tmp_path / attribute(GPU, "")).mkdir(parents=True)
    (tmp_path / attribute(GPU, "config")).write_bytes(config)

    assert await sysfs.config_header(GPU, 10) == config[:64]


@children
async def test_config_header_that_cannot_be_read_tells_why(sysfs: Sysfs, tmp_path: Path) -> None:
    with pytest.raises(SysfsError, match="could not be read: No such file") as missing:
        await sysfs.config_header(GPU, 10)
    (tmp_path / attribute(GPU, "")).mkdir(parents=True)
    os.mkfifo(tmp_path / attribute(GPU, "config"))
    with pytest.raises(SysfsError, match=r"could not be read: od did not end") as hanging:
        await sysfs.config_header(GPU, 0.05)

    assert missing.value.errno == errno.ENOENT
    assert hanging.value.errno is None


@pytest.mark.real_command("head", "od")
async def test_overrides_are_read_of_many_functions_and_never_waited_for(
    sysfs: Sysfs, tmp_path: Path
) -> None:
    other, stuck = PciAddress.parse("0000:42:00.0"), PciAddress.parse("0000:43:00.0")
    for address, text in ((GPU, "vfio-pci\n"), (other, "(null)\n"), (stuck, None)):
        file = tmp_path / attribute(address, "driver_override")
        file.parent.mkdir(parents=True)
        os.mkfifo(file) if text is None else file.write_text(text)
    assert await sysfs.overrides([GPU, other], 10) == {GPU: "vfio-pci", other: ""}
    told = await sysfs.overrides([GPU, stuck], 0.2)
    assert told == {GPU: "vfio-pci", stuck: ""}
    assert await sysfs.overrides([], 10) == {}


async def test_errors_of_other_kernels_are_named_too(tmp_path: Path) -> None:
    class Files:
        async def write(self, *_: object) -> None:
            raise OSError

        async def read(self, *_: object) -> bytes:
            raise OSError(524, "ENOTSUPP is for the kernel's own use")

        async def read_many(self, *_: object) -> list[bytes]:
            return [b""]

    sysfs = Sysfs(tmp_path, Files())

    assert "no reason given (EIO)" in (await refusal(sysfs, FILE, "1")).detail
    with pytest.raises(GpudError, match=r"own use \(524\)"):
        await sysfs.config_header(GPU, 1)
    assert await sysfs.config_headers([GPU], 1) == {GPU: b""}


def test_text_is_stripped_and_none_where_there_is_none(sysfs: Sysfs, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("auto\n")

    assert sysfs.text(FILE) == "auto"
    assert sysfs.text(Path("other")) is None
    assert sysfs.exists(FILE)
    assert not sysfs.exists(Path("other"))


def test_writable_asks_for_this_process(sysfs: Sysfs, tmp_path: Path) -> None:
    (tmp_path / FILE).touch()

    assert sysfs.writable(FILE)
    assert not sysfs.writable(Path("other"))


def test_links_name_driver_and_group(sysfs: Sysfs, tmp_path: Path) -> None:
    (tmp_path / attribute(GPU, "")).mkdir(parents=True)

    assert sysfs.driver(GPU) is None
    assert sysfs.iommu_group(GPU) is None
    (tmp_path / attribute(GPU, "driver")).symlink_to("../../drivers/nvidia")
    (tmp_path / attribute(GPU, "iommu_group")).symlink_to("../../../kernel/iommu_groups/12")
    assert sysfs.driver(GPU) == "nvidia"
    assert sysfs.iommu_group(GPU) == 12


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_who_cannot_look_does_not_say_that_a_file_is_not_there(
    sysfs: Sysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def exhausted(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / FILE).write_text("there\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", exhausted)
        with pytest.raises(SysfsError, match="file cannot be read") as told:
            sysfs.text(FILE)
    assert told.value.transient
    assert sysfs.text(FILE) == "there"
    assert sysfs.text(Path("none")) is None
