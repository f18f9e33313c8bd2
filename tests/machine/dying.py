"""gpud, run for real, with a fault at named points of an order's life.

    python -m tests.machine.dying --at before:clone_disk serve --config FILE
    python -m tests.machine.dying --at after:clone_disk --hold DIRECTORY serve --config FILE

A point is ``before:STEP``, before the act, or ``after:STEP``, between the act and its commit. There the
process kills itself; or, with ``--hold``, it makes a file of the point's name in DIRECTORY, and the step
goes on when that is gone. Each point strikes once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gpud import app, cli
from gpud.lifecycle.outcome import Nap, Outcome, StepFunction
from gpud.lifecycle.worker import Worker
from gpud.model import Instance, Step

Strike = Callable[[str], Awaitable[None]]


async def die(_point: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def hold(directory: Path, point: str) -> None:
    held = directory / point
    held.touch()
    while held.exists():
        await asyncio.sleep(0.02)


def struck(
    steps: Mapping[Step, StepFunction], points: set[str], strike: Strike
) -> dict[Step, StepFunction]:
    """The steps, with a fault at those points."""

    async def once(point: str) -> None:
        if point in points:
            points.discard(point)
            await strike(point)

    async def run(step: Step, instance: Instance) -> Outcome:
        await once(f"before:{step.value}")
        outcome = await steps[step](instance)
        if not isinstance(outcome, Nap):
            await once(f"after:{step.value}")
        return outcome

    return {step: partial(run, step) for step in steps}


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.machine.dying")
    parser.add_argument("--at", action="append", default=[], metavar="POINT")
    parser.add_argument("--hold", type=Path, metavar="DIRECTORY")
    arguments, rest = parser.parse_known_args()
    strike: Strike = partial(hold, arguments.hold) if arguments.hold else die
    points = set(arguments.at)

    def worker(store: Any, steps: Mapping[Step, StepFunction], *more: Any) -> Worker:
        return Worker(store, struck(steps, points, strike), *more)

    vars(app)["Worker"] = worker
    cli.main(rest)


if __name__ == "__main__":
    main()
