"""What many verbs share: where the configuration is, and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gpud.configfile import load_config
from gpud.errors import GpudError

_SERVICE_SOCKET = Path("/run/gpud/gpud.sock")
_SERVICE_CONFIG = Path("/etc/gpud/gpud.yaml")


def inherited(ctx: click.Context, option: click.Parameter, value: Any) -> Any:  # noqa: ANN401
    """What was given before a sub-verb holds for it too, unless it is given again."""
    name, parent = str(option.name), ctx.parent
    if _typed(ctx, name) or parent is None or not _typed(parent, name):
        return value
    return parent.params[name]


def _typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=_SERVICE_CONFIG,
    envvar="GPUD_CONFIG",
    show_default=True,
    show_envvar=True,
    callback=inherited,
    help="The daemon's configuration.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, callback=inherited, help="Print JSON."
)


def socket_of(config_file: Path) -> Path:
    """Where the daemon listens, which knows its runtime directory from systemd; this command does not.

    The service can be asked while its configuration is being edited: it goes by what it last read.

    Raises:
        GpudError: ``CONFIG_INVALID``, and it is not the service's, or that does not run.
    """
    try:
        expected = load_config(config_file).admin_socket_path
    except GpudError as error:
        if config_file != _SERVICE_CONFIG or not _there(_SERVICE_SOCKET):
            raise
        click.echo(f"Warning: the daemon goes by what it last read, and not by {error}", err=True)
        return _SERVICE_SOCKET
    return expected if _there(expected) or not _there(_SERVICE_SOCKET) else _SERVICE_SOCKET


def _there(socket: Path) -> bool:
    """Whether there is a socket, or a directory that this user may not look into, as the daemon's is."""
    try:
        return socket.exists()
    except PermissionError:
        return True
