"""What verbs share that show something of the daemon's: once, as JSON, or again and again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click
from rich.console import RenderableType

from gpud import tables
from gpud.cli.options import inherited
from gpud.screens import live


def on_a_terminal() -> bool:
    """Whether a person looks at what is printed."""
    return sys.stdout.isatty()


def _watched(ctx: click.Context, option: click.Parameter, value: Any) -> Any:  # noqa: ANN401
    watch = inherited(ctx, option, value)
    if watch and not on_a_terminal():
        raise click.UsageError("--watch needs a terminal; programs ask for --json")
    return watch


watch_option = click.option(
    "--watch", is_flag=True, callback=_watched,
    help=f"Show it anew every {live.EVERY_S:g} s, until Ctrl-C.",
)  # fmt: skip


def present(
    ask: Callable[[], Any], draw: Callable[[Any], RenderableType], *, as_json: bool, watch: bool
) -> None:
    """Show an answer of the daemon's: to a program, to a person, or to a person again and again."""
    if watch and as_json:
        raise click.UsageError("--watch is for people, --json for programs")
    if watch:
        live.watch(lambda: draw(ask()), tables.console())
    elif as_json:
        tables.show_json(ask())
    else:
        tables.console().print(draw(ask()))
