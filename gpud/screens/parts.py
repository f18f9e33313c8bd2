"""What screens have in common: facts with their names, and events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from gpud.tables import event_words, local_time

Row = Mapping[str, Any]


def facts(named: Iterable[tuple[str, Text | str]]) -> Table:
    """Facts with their names before them; empty ones are left out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, fact in named:
        if fact:
            grid.add_row(name, fact if isinstance(fact, Text) else Text(fact))
    return grid


def events(found: Sequence[Row], *, whom: bool) -> Table | Text:
    """Events, oldest first; ``whom``: with what each is about."""
    if not found:
        return Text("nothing has happened yet", style="dim")
    grid = Table.grid(padding=(0, 2, 0, 0))
    for event in found:
        about, change, why = event_words(event)
        told = Text("  ").join(Text(part) for part in (change, why) if part)
        subject = [Text(about)] if whom else []
        grid.add_row(Text(local_time(event["at"])), *subject, told)
    return grid


def heading(text: str) -> Text:
    """What comes below it, in a word."""
    return Text(f"\n{text}", style="bold")
