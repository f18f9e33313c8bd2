"""Programs are run for real: what is tested is how gpud and the kernel handle processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_socket import SocketConnectBlockedError

from gpud import command
from gpud.errors import Code, GpudError
from tests.unit.fakes.orders import until_reaped

SHELL = "/bin/sh"
shell = pytest.mark.real_command("sh")


async def refusal(*argv: str | Path, timeout_s: float = 10, **options: Any) -> GpudError:
    with pytest.raises(GpudError) as caught:
        await command.run(*argv, timeout_s=timeout_s, **options)
    assert caught.value.code is Code.HOST_COMMAND_FAILED
    return caught.value


def alive(pid: int) -> bool:
    """Whether a process still runs; one that is dead but not yet reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def remembered_starts(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every program that is started from now on."""
    started = []
    really_start = command._start

    def start(*words: Any) -> subprocess.Popen[bytes]:
        started.append(really_start(*words))
        return started[-1]

    monkeypatch.setattr(command, "_start", start)
    return started


def read_pid(path: Path) -> int:
    return int(path.read_text())


@shell
async def test_hands_back_output_and_exit_status() -> None:
    done = await command.run(SHELL, "-c", "echo out; echo err >&2; exit 3", timeout_s=10, ok=(0, 3))

    assert done == command.Completed("out", "err", 3)


@shell
async def test_arguments_reach_the_program_unread_by_any_shell(tmp_path: Path) -> None:
    hostile = '$(touch pwned); `id` * \n"'

    done = await command.run(
        SHELL, "-c", 'printf "[%s]" "$@"', "-", hostile, tmp_path, timeout_s=10, cwd=tmp_path
    )

    assert done.stdout == f"[{hostile}][{tmp_path}]"
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@shell
async def test_environment_is_minimal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUD_SECRET", "hidden")

    done = await command.run(SHELL, "-c", "export -p", timeout_s=10, env={"EXTRA": "yes"})

    assert "LC_ALL='C'" in done.stdout
    assert "EXTRA='yes'" in done.stdout
    assert "hidden" not in done.stdout


@shell
async def test_input_is_fed_and_without_it_the_program_reads_end_of_file() -> None:
    payload = b"x" * 300_000  # more than a pipe holds

    fed = await command.run(SHELL, "-c", "cat", timeout_s=10, input=payload)
    nothing = await command.run(SHELL, "-c", "cat", timeout_s=10)

    assert fed.stdout == payload.decode()
    assert nothing.stdout == ""


@shell
async def test_a_program_may_leave_its_input_unread() -> None:
    done = await command.run(SHELL, "-c", "exit 0", timeout_s=10, input=b"x" * 1_000_000)

    assert done.exit_code == 0


@shell
async def test_failure_tells_program_status_and_tail_but_no_argument() -> None:
    script = "yes noise | head -n 9999 >&2; echo the reason >&2; exit 7"

    error = await refusal(SHELL, "-c", script, "s3cret-argument")

    assert error.detail.startswith("sh ended with status 7")
    assert error.detail.endswith("the reason")
    assert len(error.detail) < 5000
    assert "s3cret" not in str(error)


@shell
async def test_silent_failure_and_death_by_signal_are_told() -> None:
    assert "sh ended with status 1: it said nothing" in str(await refusal(SHELL, "-c", "exit 1"))
    assert "sh was killed by SIGTERM" in str(await refusal(SHELL, "-c", "kill $$"))


@shell
async def test_endless_output_is_refused_without_being_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "_MAX_STDOUT_BYTES", 1000)

    error = await refusal(SHELL, "-c", "head -c 1001 /dev/zero")
    within = await command.run(SHELL, "-c", "head -c 1000 /dev/zero", timeout_s=10)

    assert "sh wrote more than 1000 bytes" in str(error)
    assert len(within.stdout) == 1000


@shell
async def test_timeout_kills_the_program_and_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "child"
    started = time.monotonic()

    error = await refusal(SHELL, "-c", f"sleep 600 & echo $! > {pid_file}; wait", timeout_s=0.2)

    assert "sh did not end within 0.2 s and was killed" in str(error)
    assert "not gone away" not in str(error)
    assert time.monotonic() - started < 5
    await until(lambda: not alive(read_pid(pid_file)))


@shell
async def test_timeout_kills_a_child_that_outlived_the_program(tmp_path: Path) -> None:
    pid_file = tmp_path / "child"

    await refusal(SHELL, "-c", f"sleep 600 & echo $! > {pid_file}", timeout_s=0.2)

    await until(lambda: not alive(read_pid(pid_file)))


@shell
async def test_cancellation_kills_the_program_and_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "child"
    script = f"sleep 600 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait"
    task = asyncio.create_task(command.run(SHELL, "-c", script, timeout_s=600))
    await until(pid_file.exists)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await until(lambda: not alive(read_pid(pid_file)))


@shell
@pytest.mark.parametrize("steps", range(6))
def test_a_loop_that_is_closed_cancels_what_is_being_started(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    started = remembered_starts(monkeypatch)

    async def left_behind() -> None:
        tasks = [
            asyncio.create_task(command.run(SHELL, "-c", "sleep 600", timeout_s=600))
            for _ in range(3)
        ]
        for _ in range(steps):
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)

    asyncio.run(left_behind())

    assert len(started) == 3
    assert not any(alive(process.pid) for process in started)


@shell
async def test_cancelled_twice_it_leaves_no_zombie(monkeypatch: pytest.MonkeyPatch) -> None:
    really_kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda *_: None)  # as in uninterruptible sleep
    started = remembered_starts(monkeypatch)
    task = asyncio.create_task(command.run(SHELL, "-c", "exec sleep 600", timeout_s=600))
    await until(lambda: bool(started))

    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)

    assert task.cancelled()
    really_kill(started[0].pid, 9)
    await until(lambda: started[0].returncode is not None)


@shell
async def test_a_program_stuck_in_the_kernel_is_told_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    really_kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda *_: None)  # as in uninterruptible sleep
    monkeypatch.setattr(command, "_KILL_GRACE_S", 0.01)

    error = await refusal(SHELL, "-c", f"echo $$ > {pid_file}; exec sleep 600", timeout_s=0.2)

    assert "has not gone away yet" in str(error)
    really_kill(read_pid(pid_file), 9)
    await until_reaped()


async def test_missing_program_names_its_package(tmp_path: Path) -> None:
    error = await refusal("qemu-img", env={"PATH": str(tmp_path)})

    assert error.detail == "the program qemu-img is not installed"
    assert error.hint == "apt install qemu-utils"


async def test_missing_program_of_unknown_package_names_the_search_path() -> None:
    assert "/usr/sbin" in (await refusal("no-such-program-here")).hint


@shell
async def test_missing_working_directory_is_told(tmp_path: Path) -> None:
    error = await refusal(SHELL, cwd=tmp_path / "gone")

    assert "sh could not be started: No such file or directory" in str(error)
    assert not error.transient


@shell
async def test_want_of_file_descriptors_passes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # what is open stays open
    try:
        error = await refusal(SHELL)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "sh could not be started: Too many open files" in str(error)
    assert error.transient


class TestFences:
    """The fences of conftest.py themselves."""

    async def test_an_unnamed_program_is_stopped(self, program_fence: Any) -> None:
        with pytest.raises(AssertionError, match="'sh' without naming it"):
            await command.run(SHELL, "-c", "true", timeout_s=10)

        program_fence.stopped.clear()

    def test_a_stopped_program_is_recorded_for_code_that_hides_errors(
        self, program_fence: Any
    ) -> None:
        with contextlib.suppress(AssertionError):
            subprocess.run(["true"], check=False)
        with contextlib.suppress(AssertionError):
            os.system("true")  # noqa: S605

        assert program_fence.stopped == ["true", "true"]
        program_fence.stopped.clear()

    def test_other_hosts_are_out_of_reach(self) -> None:
        with (
            socket.socket() as outside,
            pytest.warns(UserWarning, match="192.0.2.1"),
            pytest.raises(SocketConnectBlockedError),
        ):
            outside.connect(("192.0.2.1", 80))

    def test_this_machine_is_in_reach(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            caller.connect(str(tmp_path / "s"))
