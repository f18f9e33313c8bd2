"""Fences around every unit test: no program is started and no host is called unless the test says so."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_socket
from hypothesis import settings

from tests.fake_nvml import library

# A busy machine makes an example slow, not wrong.
settings.register_profile("gpud", deadline=None, max_examples=40)
settings.load_profile("gpud")

_SHARED_MEMORY = Path("/dev/shm")
_STARTS_A_PROGRAM = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"}


class ProgramFence:
    """Stops every start of a program that the running test has not named.

    An audit hook (PEP 578) sees all of Python's ways to start one, asyncio's included, on any
    thread. It cannot be removed, hence one hook for the whole run and a switch.
    """

    def __init__(self) -> None:
        self.allowed: frozenset[str] | None = None
        self.stopped: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _STARTS_A_PROGRAM or self.allowed is None:
            return
        program = Path(os.fsdecode(args[0])).name
        if program not in self.allowed:
            self.stopped.append(program)
            raise AssertionError(f"the test started {program!r} without naming it")


_FENCE = ProgramFence()


def pytest_configure(config: pytest.Config) -> None:
    if _SHARED_MEMORY.is_dir():  # hosts are laid out by the hundred
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_SHARED_MEMORY))
    config.addinivalue_line(
        "markers", "real_command(*programs): the test runs these programs for real"
    )


@pytest.fixture(autouse=True)
def program_fence(request: pytest.FixtureRequest) -> Iterator[ProgramFence]:
    """Let only the programs of ``real_command`` marks start; tell even when the code hid the error."""
    marks = request.node.iter_markers("real_command")
    _FENCE.allowed = frozenset(program for mark in marks for program in mark.args)
    _FENCE.stopped = []
    yield _FENCE
    _FENCE.allowed = None
    assert not _FENCE.stopped, f'name them: @pytest.mark.real_command("{_FENCE.stopped[0]}")'


@pytest.fixture(scope="session")
def nvml_library() -> Path:
    """The directory of a ``libnvidia-ml.so.1`` that says what a text file says."""
    return library.build()


@pytest.fixture(autouse=True)
def socket_fence() -> None:
    """Let sockets reach this machine only. The plugin itself lifts this after each test."""
    pytest_socket.socket_allow_hosts(["127.0.0.1", "::1"], allow_unix_socket=True)
