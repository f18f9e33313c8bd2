"""A pytest plugin: what the tests did to gpud, and how it came through, in one table.

A test asks for the fixture ``fault_log`` and records each kind of fault it injected. At the end of the
run, in all processes of it together, one table is printed; ``--fault-table FILE`` also writes it as
Markdown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # a plugin is loaded before the measurement of coverage begins
    from gpud.audit.facts import Finding

_KEY = "gpud_faults"
_HEADINGS = ("fault", "runs", "recovered", "leaks", "double claims", "slowest recovery")


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """How often a fault was injected, and what came of it.

    Attributes:
        recovered: Runs after which everything was in order again.
        leaks: Things left over that belong to nobody alive.
        double_claims: Things that two had at once.
        slowest_s: The longest time from the fault's end to everything in order, in seconds.
    """

    fault: str
    runs: int
    recovered: int
    leaks: int
    double_claims: int
    slowest_s: float

    def __add__(self, other: FaultRecord) -> FaultRecord:
        return FaultRecord(
            self.fault,
            self.runs + other.runs,
            self.recovered + other.recovered,
            self.leaks + other.leaks,
            self.double_claims + other.double_claims,
            max(self.slowest_s, other.slowest_s),
        )


class FaultLog:
    """What one process of a test run has recorded."""

    def __init__(self) -> None:
        self.records: dict[str, FaultRecord] = {}

    def record(
        self,
        fault: str,
        *,
        runs: int = 1,
        recovered: int,
        leaks: int = 0,
        double_claims: int = 0,
        slowest_s: float,
    ) -> None:
        """Add runs of one fault; see :class:`FaultRecord`."""
        self.add(FaultRecord(fault, runs, recovered, leaks, double_claims, slowest_s))

    @contextmanager
    def recovering(
        self, fault: str, *, runs: int = 1, since: float | None = None
    ) -> Iterator[list[Finding]]:
        """Record how long the block takes in which gpud recovers from a fault, and what it came to.

        The block puts what the check found at its end into the list that it gets; that has to be nothing.

        Args:
            fault: Its name in the table.
            runs: How many of it are recovered from at once.
            since: When the recovery began, by ``time.perf_counter``, where that was before the block.
        """
        findings: list[Finding] = []
        began = time.perf_counter() if since is None else since
        recovered = 0
        try:
            yield findings
            assert findings == []
            recovered = runs
        finally:
            kinds = [str(finding.kind) for finding in findings]
            self.record(
                fault,
                runs=runs,
                recovered=recovered,
                leaks=kinds.count("leak"),
                double_claims=kinds.count("double claim"),
                slowest_s=time.perf_counter() - began,
            )

    def add(self, record: FaultRecord) -> None:
        known = self.records.get(record.fault)
        self.records[record.fault] = record if known is None else known + record


_LOG = pytest.StashKey[FaultLog]()


@pytest.fixture(scope="session")
def fault_log(request: pytest.FixtureRequest) -> FaultLog:
    """Where a test records the faults that it injected."""
    return request.config.stash[_LOG]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE", help="write the table of faults as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LOG] = FaultLog()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Only a worker of pytest-xdist has such an output.
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_KEY] = [asdict(one) for one in session.config.stash[_LOG].records.values()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:  # noqa: ARG001 - pytest's signature
    for one in getattr(node, "workeroutput", {}).get(_KEY, []):
        node.config.stash[_LOG].add(FaultRecord(**one))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    records = sorted(config.stash[_LOG].records.values(), key=lambda one: one.fault)
    if not records:
        return
    terminalreporter.section("faults")
    for line in _aligned(_rows(records)):
        terminalreporter.line(line)
    file = config.getoption("--fault-table")
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(_markdown(records, config))


def _rows(records: Iterable[FaultRecord]) -> list[Sequence[str]]:
    return [
        (
            one.fault,
            str(one.runs),
            str(one.recovered),
            str(one.leaks),
            str(one.double_claims),
            f"{one.slowest_s:.2f} s",
        )
        for one in records
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    table = [_HEADINGS, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADINGS))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in table
    ]


def _markdown(records: Sequence[FaultRecord], config: pytest.Config) -> str:
    command = " ".join(["pytest", *config.invocation_params.args])
    crashes = os.environ.get("CHAOS_CRASHES")
    settings = "" if crashes is None else f"CHAOS_CRASHES={crashes} "
    seed = config.getoption("--hypothesis-seed", default=None)
    lines = [
        "# What was done to gpud, and how it came through",
        "",
        f"Command: `{settings}{command}`  ",
        f"Seed: {'none was given' if seed is None else seed}",
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "|---|" + "--:|" * (len(_HEADINGS) - 1),
        *("| " + " | ".join(row) + " |" for row in _rows(records)),
    ]
    return "\n".join([*lines, ""])
