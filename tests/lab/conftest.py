"""The lab for all scenarios, and the table of what came of them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.lab.lab import Lab, running_lab

_ROWS = pytest.StashKey[list[tuple[str, str, float]]]()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _lab(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    """The server, booted and with gpud in it; one for all scenarios."""
    # Not pytest's own directory: a Unix socket's path has a hundred characters at most.
    directory = Path(tempfile.mkdtemp(prefix="gpud-lab.", dir="/var/tmp"))
    cache = Path(os.environ["GPUD_TEST_IMAGE"]).parent
    began = time.monotonic()
    try:
        async with running_lab(directory, cache) as lab:
            took_s = time.monotonic() - began
            request.config.stash[_ROWS].append(
                ("the server boots, gpud is installed", "ok", took_s)
            )
            yield lab
    finally:
        shutil.rmtree(directory)


@pytest_asyncio.fixture(loop_scope="session")
async def lab(_lab: Lab, request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    """The lab for one scenario, which finds and leaves it without instances."""
    yield _lab
    if _lab.server.dead:  # the next scenario begins with a new one
        return
    if getattr(request.node, "failed", False):
        print(await _lab.last_words())
    try:
        await _lab.clean_up()
    except BaseException:
        print(await _lab.last_words())
        raise


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    result = yield
    item.deaths_before = item.funcargs["lab"].deaths  # type: ignore[attr-defined]
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report: pytest.TestReport = yield
    if report.when == "call":
        item.failed = report.failed  # type: ignore[attr-defined]
        result: str = "ok" if report.passed else str(report.outcome)
        if item.funcargs["lab"].deaths > item.deaths_before:  # type: ignore[attr-defined]
            result += ", after the emulated server had died once"
        sentence = (item.function.__doc__ or item.name).splitlines()[0]  # type: ignore[attr-defined]
        item.config.stash[_ROWS].append((sentence.rstrip("."), result, report.duration))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table: scenario, result, seconds."""
    rows = terminalreporter.config.stash[_ROWS]
    if not rows:
        return
    width = max(len(sentence) for sentence, _, _ in rows)
    terminalreporter.section("the lab")
    terminalreporter.line(f"{'scenario':{width}} {'seconds':>8}  result")
    for sentence, result, seconds in rows:
        terminalreporter.line(f"{sentence:{width}} {seconds:8.0f}  {result}")
    terminalreporter.line(f"{'all':{width}} {sum(row[2] for row in rows):8.0f}")
