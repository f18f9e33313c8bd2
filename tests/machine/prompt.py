"""A shell in which documented commands are typed, with a ``gpud`` that is quick to start.

    python -m tests.machine.prompt      what :class:`Prompt` talks to

A start of ``gpud`` costs a second, almost all of it imports. So one process imports it once, and is
forked for each command that is nothing but a call of it; in pipes and scripts it is the real program.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from gpud.cli import VERBS, main
from tests.machine.processes import GPUD

_OF_A_SHELL: Final = frozenset("|&;<>$`*?\n")
TIMEOUT_S: Final = 60


class Prompt:
    """Runs one command after another.

    Args:
        directory: The working directory, which also gets a program ``gpud``.
        env: What is in the environment beside what is there anyway.
    """

    def __init__(self, directory: Path, env: Mapping[str, str]) -> None:
        self.directory = directory
        programs = directory / "bin"
        programs.mkdir()
        wrapper = programs / "gpud"
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(GPUD)} "$@"\n')
        wrapper.chmod(0o755)
        self.env = {**os.environ, **env, "PATH": f"{programs}:{os.environ['PATH']}"}
        self._log = directory / "output"
        self._forking = subprocess.Popen(
            [sys.executable, "-m", "tests.machine.prompt"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, text: str) -> tuple[int, str]:
        """The exit status of a command, and what it printed; every question is answered with yes."""
        words = shlex.split(text, comments=True) if not _OF_A_SHELL & set(text) else []
        if words[:1] != ["gpud"]:
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", text], cwd=self.directory, env=self.env,
                input="y\n" * 9, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=TIMEOUT_S, check=False,
            )  # fmt: skip
            return done.returncode, done.stdout
        assert self._forking.stdin is not None
        assert self._forking.stdout is not None
        asked = {"words": words[1:], "directory": str(self.directory), "env": self.env,
                 "log": str(self._log)}  # fmt: skip
        self._forking.stdin.write(json.dumps(asked) + "\n")
        self._forking.stdin.flush()
        status = int(self._forking.stdout.readline())
        return status, self._log.read_text()

    def close(self) -> None:
        """End it."""
        self._forking.communicate()


def serve() -> None:
    """Run commands until nobody asks any more."""
    for verb in VERBS:  # or each child would import its own
        main.get_command(click.Context(main), verb)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(words: list[str], directory: str, env: dict[str, str], log: str) -> Any:
    """Be ``gpud`` with these words; does not return."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(directory)
    yes, no = os.pipe()
    os.write(no, b"y\n" * 9)
    os.close(no)
    os.dup2(yes, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        main(words, prog_name="gpud")
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)


if __name__ == "__main__":
    serve()
