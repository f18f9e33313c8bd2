"""The server at a glance."""

from __future__ import annotations

from pathlib import Path

import click

from gpud import adminclient
from gpud.cli.options import config_option, json_option, socket_of
from gpud.cli.showing import present, watch_option
from gpud.screens.status import status_screen


@click.command()
@config_option
@json_option
@watch_option
def status(config_file: Path, *, as_json: bool, watch: bool) -> None:
    """Show the server at a glance: whether it sells, GPUs, instances, offers, earnings, events."""
    present(
        lambda: adminclient.get(socket_of(config_file), "/status"),
        status_screen,
        as_json=as_json,
        watch=watch,
    )
