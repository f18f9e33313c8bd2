"""Many files at once. The children are real, and so are the files they block on: FIFOs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gpud import command
from gpud.errors import GpudError
from gpud.host.kernelfiles import InChildren
from tests.unit.fakes.orders import until_reaped

pytestmark = pytest.mark.real_command("head", "od", "dd")

PATIENT_S = 10.0
HASTY_S = 0.3
HEADER = bytes(range(64))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that were started, and the files that each was to read."""
    calls: list[str] = []
    real = command.run

    async def run(*argv: str | Path, **options: object) -> command.Completed:
        names = [Path(argument).name for argument in argv if Path(argument).is_absolute()]
        calls.append(" ".join((str(argv[0]), *names)))
        return await real(*argv, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "run", run)
    return calls


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Iterable[str]], list[Path]]:
    """Make files of 4 KiB as root sees them, each with bytes of its own at its beginning."""

    def made(names: Iterable[str]) -> list[Path]:
        files = [tmp_path / name for name in names]
        for file in files:
            file.write_bytes(header(file) + bytes(4032))
        return files

    return made


def header(file: Path) -> bytes:
    return file.name.encode().ljust(64, b"\n")


Make = Callable[[Iterable[str]], list[Path]]


@asynccontextmanager
async def stuck(*files: Path) -> AsyncIterator[None]:
    """Let nobody come back from reading the files, until the end of this."""
    for file in files:
        file.unlink()
        os.mkfifo(file)
    yield
    for file in files:
        if file.is_fifo():
            free(file)


def free(file: Path) -> None:
    """Let the readers of a stuck file come back, with nothing; who comes now gets its content."""
    writer = os.open(file, os.O_RDWR | os.O_NONBLOCK)  # which never waits for a reader
    file.unlink()
    file.write_bytes(header(file))
    os.close(writer)


async def test_no_files_are_no_work(started: list[str]) -> None:
    assert await InChildren().read_many([], 64, PATIENT_S) == []
    assert started == []


async def test_all_are_read_by_one_child(make: Make, started: list[str]) -> None:
    files = make("abc")

    assert await InChildren().read_many(files, 64, PATIENT_S) == [header(file) for file in files]
    assert started == ["head a b c"]


async def test_any_bytes_arrive(make: Make, tmp_path: Path) -> None:
    (one,) = make("a")
    contents = [
        bytes(range(64)),
        b"\n==> x <==\n".ljust(64, b"\n"),
        b"\xff" * 64,
        f"==> {one} <==\n".encode().ljust(64, b"\n")[:64],
    ]
    files = [tmp_path / str(number) for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)

    assert await InChildren().read_many([one, *files], 64, PATIENT_S) == [header(one), *contents]


async def test_what_cannot_be_read_leaves_the_others_as_they_are(
    make: Make, tmp_path: Path, started: list[str]
) -> None:
    a, b, short = make(("a", "b", "short"))
    short.write_bytes(b"\xde\x10\n")
    (tmp_path / "directory").mkdir()
    files = [tmp_path / "gone", a, short, tmp_path / "directory", tmp_path / "missing", b]

    found = await InChildren().read_many(files, 64, PATIENT_S)

    assert found == [b"", header(a), b"\xde\x10\n", b"", b"", header(b)]
    assert len(started) == 1


async def test_only_unreadable_ones_are_an_answer_too(tmp_path: Path) -> None:
    assert await InChildren().read_many([tmp_path / "gone"], 64, PATIENT_S) == [b""]


async def test_one_that_hangs_costs_the_others_a_moment(make: Make, started: list[str]) -> None:
    a, b, c = make("abc")
    gone = a.with_name("gone")
    begun = time.monotonic()
    async with stuck(b):
        found = await InChildren().read_many([a, b, c, gone], 64, HASTY_S)

        assert found == [header(a), b"", header(c), b""]
        assert time.monotonic() - begun < 2
        assert started == ["head a b c gone", "od a", "od b", "od c", "od gone"]


async def test_one_that_hangs_is_not_asked_again_until_it_comes_back(
    make: Make, started: list[str]
) -> None:
    a, b = make("ab")
    files = InChildren()
    async with stuck(b):
        await files.read_many([a, b], 64, HASTY_S)
        started.clear()

        assert await files.read_many([a, b], 64, PATIENT_S) == [header(a), b""]
        assert started == ["head a"]
    while await files.read_many([a, b], 64, PATIENT_S) != [header(a), header(b)]:
        await asyncio.sleep(0.002)
    assert started[-1] == "head a b"


async def test_when_none_comes_back_that_says_nothing_about_any(make: Make) -> None:
    a, b = make("ab")
    files = InChildren()
    async with stuck(a, b):
        for _ in range(2):  # the second time, both are known to hang
            with pytest.raises(GpudError, match="not one of 2 files") as raised:
                await files.read_many([a, b], 64, HASTY_S)
            assert raised.value.transient


async def test_without_programs_nothing_is_said_about_any(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(command._ENVIRONMENT, "PATH", "/nonexistent")

    with pytest.raises(GpudError, match="not one of 1 files"):
        await InChildren().read_many(make("a"), 64, PATIENT_S)


async def test_two_who_ask_at_a_time_find_one_that_hangs_once(
    make: Make, started: list[str]
) -> None:
    a, b = make("ab")
    files = InChildren()
    async with stuck(b):
        both = await asyncio.gather(*(files.read_many([a, b], 64, HASTY_S) for _ in range(2)))

    assert both == [[header(a), b""]] * 2
    assert started == ["head a b", "od a", "od b", "head a"]


async def test_a_child_inside_the_kernel_does_not_hold_up_the_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    survivors: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda pid, _: survivors.append(pid))  # it cannot be killed
    monkeypatch.setattr(command, "_KILL_GRACE_S", 0.01)
    a, b = make("ab")
    async with stuck(b):
        assert await InChildren().read_many([a, b], 64, HASTY_S) == [header(a), b""]
    assert len(survivors) == 1  # it lives until the kernel lets go of it, as now
    await until_reaped()


async def test_what_is_stuck_inside_the_kernel_is_not_tried_beside_itself(
    make: Make, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "killpg", lambda *_: None)  # it cannot be killed
    monkeypatch.setattr(command, "_KILL_GRACE_S", 0.01)
    written, read, other = make("wro")
    files = InChildren()
    async with stuck(written, read):
        for act in (files.write(written, "1", HASTY_S), files.read(read, 64, HASTY_S)):
            with pytest.raises(GpudError, match="has not gone away yet"):
                await act
        for act in (files.write(written, "1", PATIENT_S), files.read(read, 64, PATIENT_S)):
            with pytest.raises(GpudError, match=r"process \d+, which tried the same before"):
                await act
        assert len(started) == 2
        # Another write, and another file, are no business of theirs.
        await files.write(other, "2", PATIENT_S)
        with pytest.raises(GpudError, match="has not gone away yet"):
            await files.write(written, "2", HASTY_S)
    await until_reaped()
    await files.write(written, "1", PATIENT_S)
    assert (await files.read(written, 1, PATIENT_S)) == b"1"
