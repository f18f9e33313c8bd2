"""The results: a table on the terminal, JSON, and the table in the documentation."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.row import Row
from tests.bench.stats import Spread

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
_BETWEEN = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.DOTALL)

Results = Mapping[str, Sequence[Row]]
"""Rows by family."""


def machine(directory: Path) -> dict[str, str]:
    """What was measured on."""
    cpus = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{len(cpus)} x {cpus[0] if cpus else platform.machine()}",
        "virtualisation": "KVM" if _has_kvm() else "none: guests are emulated",
        "memory": f"{memory_gib:.0f} GiB",
        "file system": _output("stat", "-f", "-c", "%T", str(directory)),
        "kernel": platform.release(),
        "libvirt": _output("libvirtd", "--version").rsplit(" ", 1)[-1],
        "QEMU": _output("qemu-img", "--version").split(" ")[2],
        "Python": platform.python_version(),
        "aiohttp": version("aiohttp"),
        "load at the start": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "revision": _output("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
    }


def show(results: Results, console: Console) -> None:
    """Print the table."""
    table = Table(title="gpud against its peers and floors: median, and its quartiles")
    for heading in ("", "what", "against", "ours", "theirs", "ratio", "to reach"):
        table.add_column(heading, overflow="fold")
    for family, rows in results.items():
        for row in rows:
            style = {True: "green", False: "red", None: ""}[row.met]
            table.add_row(family, *_cells(row), style=style)
        table.add_section()
    console.print(table)


def write_json(results: Results, about: Mapping[str, Any], path: Path) -> None:
    """Write all samples, with the machine they are from."""
    rows = [{"family": family, **row.as_json()} for family in results for row in results[family]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


def write_page(results: Results, about: Mapping[str, Any]) -> None:
    """Put the table in place of the one in the documentation."""
    lines = ["Command: `make bench`  \n"]
    lines += [f"{key.capitalize()}: {value}  \n" for key, value in about.items()]
    lines += [
        "\n| what | against | ours | theirs | ratio | to reach | |\n",
        "|---|---|--:|--:|--:|--:|---|\n",
    ]
    for rows in results.values():
        for row in rows:
            verdict = {True: "yes", False: "**no**", None: ""}[row.met]
            lines.append(f"| {' | '.join(_cells(row))} | {verdict} |\n")
    text = PAGE.read_text()
    PAGE.write_text(_BETWEEN.sub(lambda found: found[1] + "".join(lines) + found[2], text))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.what, row.against, _side(row.ours, row.unit), _side(row.theirs, row.unit),
        f"{_number(row.ratio.median)} ({_number(row.ratio.low)} to {_number(row.ratio.high)})",
        "" if row.target is None else str(row.target),
    )  # fmt: skip


def _side(samples: Sequence[float], unit: str) -> str:
    return f"{_number(Spread.of(samples).median)} {unit}"


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _has_kvm() -> bool:
    flags = Path("/proc/cpuinfo").read_text().split()
    return Path("/dev/kvm").exists() and ("vmx" in flags or "svm" in flags)


def _output(*argv: str) -> str:
    try:
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()
