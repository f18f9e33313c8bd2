"""How the command shows lists: as tables for people, as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
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


_SPARE = ("GROUP", "NUMA", "TYPE", "VRAM", "DRIVER", "INSTANCE", "USD/H", "ADDRESS", "STEP")
"""Headings left out where a screen is too narrow for all, the least needed first."""
_NOTE_WIDTH = 24
"""What a note gets at least; it is folded."""
STYLES = {
    "available": "green",
    "running": "green",
    "in use": "cyan",
    "creating": "yellow",
    "cleaning": "yellow",
    "stopping": "yellow",
    "drained": "magenta",
    "quarantined": "red",
    "unavailable": "red",
    "error": "red",
    "sold out": "dim",
    "terminated": "dim",
}


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def duration(seconds: int) -> str:
    """Seconds as people say them."""
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
    ("UPTIME", lambda row: duration(row["uptime_seconds"])),
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
    ("HELD BY", lambda row: row["holder"] or "-"),
)
IMAGES: Sequence[Column] = (
    ("NAME", lambda row: row["name"]),
    ("SHA256", lambda row: row["digest"].removeprefix("sha256:")[:12]),
    ("SIZE", lambda row: _size(row["size_bytes"])),
    ("DISK", lambda row: _size(row["virtual_size_bytes"])),
    ("SEALED", lambda row: "yes" if row["sealed"] else "unknown"),
    ("IN USE BY", lambda row: str(row["in_use_by"])),
)


def show(rows: Sequence[Row], columns: Sequence[Column], empty: str, *, as_json: bool) -> None:
    """Print ``rows`` to standard output; ``empty`` is said when there are none."""
    if as_json:
        show_json(rows)
    else:
        console().print(Listing(rows, columns, empty))


def show_gpu(card: Row | None, address: str) -> None:
    """Print what has become of the card at an address, and what speaks against selling it."""
    rows = [card] if card else []
    listing = Listing(rows, GPUS, f"no GPU is at {address} now", card_reasons(rows))
    console().print(listing)


def show_json(answer: object) -> None:
    """Print an answer for programs."""
    console().file.write(json.dumps(answer, indent=2) + "\n")


def console() -> Console:
    """Standard output. Where nobody looks at a screen, a row is a line: an id that is cut cannot be
    searched for.
    """  # noqa: D205 - one sentence and its rider
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)


@dataclass(frozen=True)
class Listing:
    """A table as wide as its screen allows.

    Attributes:
        empty: Said where there are no rows.
        below: What is to be said of the rows beside.
    """

    rows: Sequence[Row]
    columns: Sequence[Column]
    empty: str = ""
    below: RenderableType | None = None

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Leave out what has no room, and say so."""
        if not self.rows:
            yield Text(self.empty)
            return
        cells = {heading: [cell(row) for row in self.rows] for heading, cell in self.columns}
        shown = _fitting(cells, options.max_width)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in shown:
            table.add_column(heading, overflow="fold")
        for row in zip(*(cells[heading] for heading in shown), strict=True):
            # Text, so that nothing in a value is taken for rich's markup.
            table.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in row))
        yield table
        if hidden := [heading for heading in cells if heading not in shown]:
            yield Text(f"too narrow for: {', '.join(hidden)}", style="dim")
        if self.below is not None:
            yield self.below


def _fitting(cells: Mapping[str, Sequence[str]], width: int) -> list[str]:
    """The headings that there is room for; the first one is what a row is known by."""
    needed = {
        heading: max(cell_len(heading), *(cell_len(cell) for cell in column)) + 2
        for heading, column in cells.items()
    }
    if "NOTE" in needed:
        needed["NOTE"] = min(needed["NOTE"], _NOTE_WIDTH)
    first = next(iter(cells))
    for spare in _SPARE:
        if sum(needed.values()) - 2 <= width:
            break
        if spare != first:
            needed.pop(spare, None)
    return list(needed)


def local_time(at: float) -> str:
    """A moment, in local time."""
    return f"{datetime.fromtimestamp(at, UTC).astimezone():%Y-%m-%d %H:%M:%S}"


def event_line(event: Row) -> str:
    """One event as a line, in local time."""
    return "  ".join(filter(None, (local_time(event["at"]), *event_words(event))))


def event_words(event: Row) -> tuple[str, str, str]:
    """Whom an event is about, how that changed, and why."""
    whom = " ".join(filter(None, (event["upstream_id"], event["gpu"]))) or "-"
    return whom, " → ".join(filter(None, (event["was"], event["became"]))), event["why"]


def card_reasons(cards: Sequence[Row]) -> RenderableType | None:
    """Everything that speaks against selling cards, with its mend."""
    return _each_once((card["address"], reason) for card in cards for reason in card["why_not"])


def offer_reasons(offers: Sequence[Row]) -> RenderableType | None:
    """Why what is not available is not."""
    return _each_once(
        (f"{offer['gpu_type']} x{offer['gpu_count']}", offer["why_not"])
        for offer in offers
        if offer["why_not"]
    )


def _each_once(reasons: Iterable[tuple[str, str]]) -> RenderableType | None:
    """Reasons, each under all that it holds for; None where there are none."""
    subjects: dict[str, dict[str, None]] = {}
    for subject, reason in reasons:
        subjects.setdefault(reason, {})[subject] = None
    told: list[RenderableType] = []
    for reason, found in subjects.items():
        indented = Padding(Text(reason), (0, 0, 0, 2), expand=False)
        told += (Text(f"\n{', '.join(found)}"), indented)
    return Group(*told) if told else None


def show_findings(findings: Sequence[Row], *, as_json: bool) -> None:
    """Print what a check found: what it is and where, what is wrong, and what mends it."""
    if as_json:
        show_json({"findings": findings})
        return
    for one in findings:
        console().print(Text(f"{one['kind']}: {one['subject']} {one['what']}\n  {one['mend']}"))
    if not findings:
        console().print("nothing is wrong")


def show_verdicts(verdicts: Sequence[Row], *, as_json: bool) -> None:
    """Print what each check says, by group, with what mends it on a line of its own."""
    if as_json:
        show_json({"verdicts": verdicts})
        return
    screen = console()
    signs = sys.stdout.isatty() and screen.encoding.startswith("utf")
    names = max((len(one["name"]) for one in verdicts), default=0)
    for group, of_group in groupby(verdicts, key=lambda one: one["group"]):
        screen.print(Text(group, style="bold"))
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
        screen.print(table)
    counts = Counter(one["level"] for one in verdicts)
    told = (f"{number} {_plural(level, number)}" for level in _BAD if (number := counts[level]))
    screen.print(Text(", ".join(told) or "all is well", style="bold"))


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
