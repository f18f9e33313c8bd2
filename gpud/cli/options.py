"""What many verbs share: where the configuration is, JSON, and how an error is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gpud.configfile import load_config
from gpud.errors import GpudError

_SERVICE_SOCKET = Path("/run/gpud/gpud.sock")

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/gpud/gpud.yaml"),
    envvar="GPUD_CONFIG",
    show_default=True,
    show_envvar=True,
    help="The daemon's configuration.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Commands(click.Group):
    """Shows an expected error as its own words, not as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's signature
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except GpudError as error:
            raise click.ClickException(str(error)) from error


def socket_of(config_file: Path) -> Path:
    """Where the daemon listens, which knows its runtime directory from systemd; this command does not."""
    expected = load_config(config_file).admin_socket_path
    return expected if expected.exists() or not _SERVICE_SOCKET.exists() else _SERVICE_SOCKET
