"""The server at a glance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from gpud.screens.parts import Row, events, facts, heading
from gpud.tables import OFFERS, STYLES, Column, Listing, duration, local_time, offer_reasons

_BRIEFLY: Final = ("GPU TYPE", "GPUS", "TIER", "USD/H", "STOCK", "AVAILABLE")
_OFFERS: Final[Sequence[Column]] = [column for column in OFFERS if column[0] in _BRIEFLY]


def status_screen(told: Row) -> RenderableType:
    """All of ``/status``."""
    return Group(
        _first_line(told),
        *_troubles(told),
        Text(),
        facts(
            (
                ("GPUs", _counted(told["gpus"])),
                ("Instances", _counted(told["instances"])),
                ("Today", f"{told['earned_today']['usd']:.2f} USD earned since midnight"),
            )
        ),
        heading("Offers"),
        Listing(told["offers"], _OFFERS, "nothing is on offer", _why_not(told)),
        heading("Last events"),
        events(told["events"], whom=True),
    )


def _first_line(told: Row) -> Text:
    line = Text(f"gpud {told['version']}", style="bold")
    line.append(f"  up {duration(told['up_seconds'])}  ", style="not bold")
    return line.append(*("ready", "green") if told["ready"] else ("NOT READY", "bold red"))


def _troubles(told: Row) -> Iterator[Text]:
    for what, trouble in told["problems"].items():
        yield Text(f"{what}: {trouble}", style="red")
    for why in told["nothing_sold_because"]:
        yield Text(f"sells nothing: {why}", style="yellow")
    for drain in told["drains"]:
        if drain["gpu"] is not None:
            reason = f": {drain['reason']}" if drain["reason"] else ""
            since = local_time(drain["since"])
            yield Text(f"GPU {drain['gpu']} is drained since {since}{reason}", style="magenta")


def _counted(counts: Row) -> Text:
    told = [
        Text(f"{number} {(word := name.replace('_', ' '))}", style=STYLES.get(word, ""))
        for name, number in counts.items()
        if number
    ]
    return Text(", ").join(told) if told else Text("none", style="dim")


def _why_not(told: Row) -> RenderableType | None:
    """Of single offers; what keeps all of them back has been said."""
    return None if told["nothing_sold_because"] else offer_reasons(told["offers"])
