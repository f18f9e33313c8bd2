"""How the command shows lists: as tables for people, as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]

_WIDE = 500

_LEVELS = {
    "ok": ("✓", "green"),
    "note": ("·", ""),
    "warning": ("!", "yellow"),
    "fault": ("✗", "bold red"),
}
"""How a verdict's level is shown on a screen: sign and style."""
_PLAIN = {"ok": "ok     ", "note": "note   ", "warning": "warning", "fault": "FAULT  "}
_BAD = ("fault", "warning", "note")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def _duration(seconds: int) -> str:
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds % 60:02} s"


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)


INSTANCES: Sequence[Column] = (
    ("ID", lambda row: row["upstream_id"]),
    ("INSTANCE", lambda row: row["instance_id"]),
    ("STATUS", lambda row: row["status"]),
    ("STEP", lambda row: row["step"]),
    ("GPUS", lambda row: f"{row['gpu_type']} x{len(row['gpus'])}"),
    ("ADDRESS", lambda row: row["address"] or "-"),
    ("UPTIME", lambda row: _duration(row["uptime_seconds"])),
    ("USD/H", lambda row: f"{row['cost_per_hour']:.2f}"),
    ("NOTE", lambda row: row["failure"] or ""),
)
OFFERS: Sequence[Column] = (
    ("GPU TYPE", lambda row: row["gpu_type"]),
    ("GPUS", lambda row: str(row["gpu_count"])),
    ("TIER", lambda row: row["tier"]),
    ("CORES", lambda row: str(row["cpu_cores"])),
    ("RAM GB", lambda row: str(row["ram_gb"])),
    ("DISK GB", lambda row: str(row["storage_gb"])),
    ("USD/H", lambda row: f"{row['price_per_hour']:.2f}"),
    ("STOCK", lambda row: row["stock_status"] if row["available_count"] else "sold out"),
    ("AVAILABLE", lambda row: str(row["available_count"])),
)
GPUS: Sequence[Column] = (
    ("ADDRESS", lambda row: row["address"]),
    ("GPU", lambda row: row["name"] or row["gpu_type"] or row["ids"]),
    ("TYPE", lambda row: row["gpu_type"] or "-"),
    ("VRAM", lambda row: f"{row['vram_mib'] / 1024:.0f} GiB" if row["vram_mib"] else "-"),
    ("NUMA", lambda row: _or_dash(row["numa_node"])),
    ("GROUP", lambda row: _or_dash(row["iommu_group"])),
    ("DRIVER", lambda row: row["driver"] or "-"),
    ("STATE", lambda row: row["state"].replace("_", " ")),
    ("NOTE", lambda row: row["summary"]),
)
IMAGES: Sequence[Column] = (
    ("NAME", lambda row: row["name"]),
    ("SHA256", lambda row: row["digest"][:16]),
    ("SIZE", lambda row: _size(row["size_bytes"])),
    ("DISK", lambda row: _size(row["virtual_size_bytes"])),
    ("IN USE BY", lambda row: str(row["in_use_by"])),
)


def show(rows: Sequence[Row], columns: Sequence[Column], empty: str, *, as_json: bool) -> None:
    """Print ``rows`` to standard output; ``empty`` is said when there are none."""
    # Where nobody looks at a screen, a row is a line: an id that is cut cannot be searched for.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    if as_json:
        console.file.write(json.dumps(rows, indent=2) + "\n")
        return
    if not rows:
        console.print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, _ in columns:
        table.add_column(heading, overflow="fold")
    for row in rows:
        # Text, so that nothing in a value is taken for rich's markup.
        table.add_row(*(Text(cell(row)) for _, cell in columns))
    console.print(table)


def event_line(event: Row) -> str:
    """One event as a line, in local time."""
    when = datetime.fromtimestamp(event["at"], UTC).astimezone()
    whom = " ".join(filter(None, (event["upstream_id"], event["gpu"]))) or "-"
    change = " → ".join(filter(None, (event["was"], event["became"])))
    return "  ".join(filter(None, (f"{when:%Y-%m-%d %H:%M:%S}", whom, change, event["why"])))


def show_why_not(cards: Sequence[Row]) -> None:
    """Print everything that speaks against selling cards, with its mend, each once."""
    of_cards: dict[str, list[str]] = {}
    for card in cards:
        for reason in card["why_not"]:
            of_cards.setdefault(reason, []).append(card["address"])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    for reason, addresses in of_cards.items():
        console.print(Text(f"\n{', '.join(addresses)}\n  {reason}"))


def show_findings(findings: Sequence[Row], *, as_json: bool) -> None:
    """Print what a check found: what it is and where, what is wrong, and what mends it."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    if as_json:
        console.file.write(json.dumps({"findings": findings}, indent=2) + "\n")
        return
    for one in findings:
        console.print(Text(f"{one['kind']}: {one['subject']} {one['what']}\n  {one['mend']}"))
    if not findings:
        console.print("nothing is wrong")


def show_verdicts(verdicts: Sequence[Row], *, as_json: bool) -> None:
    """Print what each check says, by group, with what mends it on a line of its own."""
    on_screen = sys.stdout.isatty()
    console = Console(highlight=False, width=None if on_screen else _WIDE)
    if as_json:
        console.file.write(json.dumps({"verdicts": verdicts}, indent=2) + "\n")
        return
    signs = on_screen and console.encoding.startswith("utf")
    names = max((len(one["name"]) for one in verdicts), default=0)
    for group, of_group in groupby(verdicts, key=lambda one: one["group"]):
        console.print(Text(group, style="bold"))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column()
        table.add_column(min_width=names, no_wrap=True)
        table.add_column(overflow="fold")
        for one in of_group:
            sign, style = _LEVELS[one["level"]]
            mark = Text(f"  {sign if signs else _PLAIN[one['level']]}", style=style)
            what = Text(one["what"])
            if one["mend"]:
                what.append(f"\n{'→' if signs else '>'} {one['mend']}", style="cyan")
            table.add_row(mark, Text(one["name"]), what)
        console.print(table)
    counts = Counter(one["level"] for one in verdicts)
    told = (f"{number} {_plural(level, number)}" for level in _BAD if (number := counts[level]))
    console.print(Text(", ".join(told) or "all is well", style="bold"))


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on standard error; yields what takes (bytes done, bytes in all)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
