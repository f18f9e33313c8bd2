"""What many verbs share: where the configuration is, JSON, and how an error is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import RenderableType

from gpud import tables
from gpud.configfile import load_config
from gpud.errors import GpudError
from gpud.screens import live
from gpud.screens.live import EVERY_S

_SERVICE_SOCKET = Path("/run/gpud/gpud.sock")


def _inherited(ctx: click.Context, option: click.Parameter, value: Any) -> Any:  # noqa: ANN401
    """What was given before a sub-verb holds for it too, unless it is given again."""
    name, parent = str(option.name), ctx.parent
    if _typed(ctx, name) or parent is None or not _typed(parent, name):
        return value
    return parent.params[name]


def _typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def on_a_terminal() -> bool:
    """Whether a person looks at what is printed."""
    return sys.stdout.isatty()


def _watched(ctx: click.Context, option: click.Parameter, value: Any) -> Any:  # noqa: ANN401
    watch = _inherited(ctx, option, value)
    if watch and not on_a_terminal():
        raise click.UsageError("--watch needs a terminal; programs ask for --json")
    return watch


config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/gpud/gpud.yaml"),
    envvar="GPUD_CONFIG",
    show_default=True,
    show_envvar=True,
    callback=_inherited,
    help="The daemon's configuration.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_inherited, help="Print JSON."
)
watch_option = click.option(
    "--watch", is_flag=True, callback=_watched,
    help=f"Show it anew every {EVERY_S:g} s, until Ctrl-C.",
)  # fmt: skip


class Commands(click.Group):
    """Shows an expected error as its own words, not as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's signature
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except GpudError as error:
            raise click.ClickException(str(error)) from error


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


def socket_of(config_file: Path) -> Path:
    """Where the daemon listens, which knows its runtime directory from systemd; this command does not."""
    expected = load_config(config_file).admin_socket_path
    return expected if expected.exists() or not _SERVICE_SOCKET.exists() else _SERVICE_SOCKET
