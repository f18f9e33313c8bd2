"""Fences around every unit test: no program is started and no host is called unless the test says so."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytest_socket
import structlog
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import settings

from gpud.dev.issuer import new_key
from gpud.host.nvml import Nvml
from gpud.store import Store
from tests.fake_nvml import library
from tests.unit.fakes import recorded_host
from tests.unit.fakes.orders import Clock, quick_directory
from tests.unit.fakes.recorded_host import RecordedHost

# A busy machine makes an example slow, not wrong.
settings.register_profile("gpud", deadline=None, max_examples=40)
settings.load_profile("gpud")

_SHARED_MEMORY = Path("/dev/shm")
_STARTS_A_PROGRAM = ("system", "posix_spawn", "posix_spawnp", "execv", "execve")
"""Of module ``os``; its other ways come down to these. Module ``subprocess`` has one of its own."""


class ProgramFence:
    """Stops every start of a program that the running test has not named, on whichever thread.

    It stands where ``subprocess``, and with it asyncio, comes to its fork. An audit hook (PEP 578) would
    see as much, but runs Python at every file that is opened, and inside every start of a traced thread:
    CPython 3.11 takes two of those at a time for an error.
    """

    def __init__(self) -> None:
        self.allowed: frozenset[str] | None = None
        self.stopped: list[str] = []
        for name in _STARTS_A_PROGRAM:
            self._stand_before(os, name)
        self._stand_before(subprocess, "_fork_exec")

    def _stand_before(self, module: ModuleType, name: str) -> None:
        start = getattr(module, name)

        @functools.wraps(start)
        def fenced(program: Any, *args: Any, **kwargs: Any) -> Any:
            self._judge(program[0] if isinstance(program, list | tuple) else program)
            return start(program, *args, **kwargs)

        setattr(module, name, fenced)

    def _judge(self, program: str | bytes | os.PathLike[str]) -> None:
        name = Path(os.fsdecode(program)).name
        if self.allowed is not None and name not in self.allowed:
            self.stopped.append(name)
            raise AssertionError(f"the test started {name!r} without naming it")


_FENCE = ProgramFence()


def pytest_configure(config: pytest.Config) -> None:
    if _SHARED_MEMORY.is_dir():  # hosts are laid out by the hundred
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_SHARED_MEMORY))
    config.addinivalue_line(
        "markers", "real_command(*programs): the test runs these programs for real"
    )


def pytest_collection_finish() -> None:
    gc.freeze()  # thousands of tests, all of which live to the end: no sweep need look at them again


@pytest.fixture(autouse=True)
def program_fence(request: pytest.FixtureRequest) -> Iterator[ProgramFence]:
    """Let only the programs of ``real_command`` marks start; tell even when the code hid the error."""
    marks = request.node.iter_markers("real_command")
    _FENCE.allowed = frozenset(program for mark in marks for program in mark.args)
    _FENCE.stopped = []
    yield _FENCE
    _FENCE.allowed = None
    assert not _FENCE.stopped, f'name them: @pytest.mark.real_command("{_FENCE.stopped[0]}")'


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A verb that keeps its log to errors would keep the next test's to them, too."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def nvml_library() -> Path:
    """The directory of a ``libnvidia-ml.so.1`` that says what a text file says."""
    return library.build()


KeyMaker = Callable[[], rsa.RSAPrivateKey]


@pytest.fixture(scope="session")
def signing_keys() -> list[rsa.RSAPrivateKey]:
    return [new_key() for _ in range(3)]


@pytest.fixture
def key_maker(signing_keys: list[rsa.RSAPrivateKey]) -> KeyMaker:
    """Makes signing keys of few, since each takes a tenth of a second."""
    pool = itertools.cycle(signing_keys)
    return lambda: next(pool)


Recorded = Callable[[str], RecordedHost]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Unfolds each recorded server once, for tests that change nothing of it."""
    return functools.cache(lambda name: recorded_host.unfold(name, tmp_path_factory.mktemp(name)))


NvmlOn = Callable[..., Nvml]


@pytest.fixture
def nvml_on(tmp_path: Path, nvml_library: Path) -> NvmlOn:
    """The real bindings on a library that says this; said anew, it says that from then on."""

    def say(text: str, timeout_s: float = 20) -> Nvml:
        file = tmp_path / "nvml.txt"
        file.write_text(text)
        return Nvml(timeout_s, {"LD_LIBRARY_PATH": str(nvml_library), "FAKE_NVML": str(file)})

    return say


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with quick_directory() as directory:
        yield directory


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(state_dir: Path, clock: Clock) -> AsyncIterator[Store]:
    store = await Store.open(state_dir, clock)
    yield store
    await store.close()


@pytest.fixture(autouse=True)
def socket_fence() -> None:
    """Let sockets reach this machine only. The plugin itself lifts this after each test."""
    pytest_socket.socket_allow_hosts(["127.0.0.1", "::1"], allow_unix_socket=True)
