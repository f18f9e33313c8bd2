"""The lab for all scenarios, and the table of what came of them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.lab.lab import Lab, running_lab

_ROWS = pytest.StashKey[list[tuple[str, str, float]]]()
_BEGAN = time.monotonic()


@asynccontextmanager
async def _booted(request: pytest.FixtureRequest, what: str, *, bare: bool) -> AsyncIterator[Lab]:
    """The server in a directory of its own, with a row of the table for its start."""
    # Not pytest's own directory: a Unix socket's path has a hundred characters at most.
    directory = Path(tempfile.mkdtemp(prefix="gpud-lab.", dir="/var/tmp"))
    cache = Path(os.environ["GPUD_TEST_IMAGE"]).parent
    began = time.monotonic()
    try:
        async with running_lab(directory, cache, bare=bare) as lab:
            request.config.stash[_ROWS].append((what, "ok", time.monotonic() - began))
            yield lab
    finally:
        shutil.rmtree(directory)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _lab(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    """The server, booted and with gpud in it; one for all scenarios."""
    async with _booted(request, "the server boots, gpud is installed", bare=False) as lab:
        yield lab


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


@pytest_asyncio.fixture(loop_scope="session")
async def bare(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    """A server without gpud, whose IOMMU somebody has turned off."""
    async with _booted(request, "a bare server boots", bare=True) as lab:
        yield lab
        if getattr(request.node, "failed", False) and not lab.server.dead:
            print(await lab.last_words())


@pytest.fixture
def step(request: pytest.FixtureRequest) -> Callable[[str], AbstractAsyncContextManager[None]]:
    """Makes a part of a scenario a row of the table."""

    @asynccontextmanager
    async def step(what: str) -> AsyncIterator[None]:
        began = time.monotonic()
        yield
        request.config.stash[_ROWS].append((f"  {what}", "ok", time.monotonic() - began))

    return step


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--begin-within", type=int, metavar="SECONDS",
        help="begin no scenario but the first later than this; those left out are told",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    within_s: int | None = item.config.getoption("--begin-within")
    rows = item.config.stash[_ROWS]
    if rows and within_s is not None and time.monotonic() - _BEGAN > within_s:
        rows.append((_sentence(item), "left out for lack of time", 0))
        pytest.skip(f"{within_s} s are over")
    result = yield
    item.deaths_before = _deaths(item)  # type: ignore[attr-defined]
    return result


def _deaths(item: pytest.Item) -> int:
    """How often the server of a scenario has died of its emulation."""
    given = item.funcargs  # type: ignore[attr-defined]
    deaths: int = (given.get("lab") or given["bare"]).deaths
    return deaths


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report: pytest.TestReport = yield
    if report.when == "call":
        item.failed = report.failed  # type: ignore[attr-defined]
        result: str = "ok" if report.passed else str(report.outcome)
        if died := _deaths(item) - item.deaths_before:  # type: ignore[attr-defined]
            result += (
                f", after the emulated server had died {'once' if died == 1 else f'{died} times'}"
            )
        item.config.stash[_ROWS].append((_sentence(item), result, report.duration))
    return report


def _sentence(item: pytest.Item) -> str:
    """What a scenario shows."""
    text: str = item.function.__doc__ or item.name  # type: ignore[attr-defined]
    return text.splitlines()[0].rstrip(".")


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
    all_s = sum(seconds for sentence, _, seconds in rows if not sentence.startswith(" "))
    terminalreporter.line(f"{'all':{width}} {all_s:8.0f}")
