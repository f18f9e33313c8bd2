"""The points of an order's life at which a test can strike; see ``tests.machine.dying``."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gpud.model import FIRST_RELEASE_STEP, FIRST_STEP, Step
from tests.machine.server import GpudServer
from tests.unit.lifecycle.gpud_under_test import way

# Enumerated from the table of legal moves: a step that is added later is struck too.
CREATE_STEPS = way(FIRST_STEP, Step.RUNNING)[:-1]
RELEASE_STEPS = way(FIRST_RELEASE_STEP, Step.ENDED)[:-1]


def points(steps: list[Step]) -> list[str]:
    """Before each act, and between each act and its commit."""
    return [f"{when}:{step.value}" for step in steps for when in ("before", "after")]


class Held:
    """A daemon that waits for the test at some points; to be made before the daemon is started."""

    def __init__(self, server: GpudServer, directory: Path, *points: str) -> None:
        self._server = server
        self._directory = directory
        directory.mkdir(exist_ok=True)
        server.strike_at(*points, hold=directory)

    async def at(self, point: str, timeout_s: float = 90) -> None:
        """Wait until the daemon waits there."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (self._directory / point).exists():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            tail = self._server.daemon.tail()
            raise AssertionError(f"gpud never came to {point}:\n{tail}") from None

    def let_go(self, point: str) -> None:
        (self._directory / point).unlink()
