"""The ``gpud`` command: the verbs an operator types."""

from __future__ import annotations

import signal
from importlib import import_module
from typing import Any, Final

import click

from gpud import __version__
from gpud.errors import GpudError

VERBS: Final = {
    "serve": "serve",
    "reload": "configuration",
    "config": "configuration",
    "openapi": "configuration",
    "status": "status",
    "instances": "instances",
    "events": "orders",
    "offers": "orders",
    "console": "orders",
    "gpus": "gpus",
    "drain": "drains",
    "undrain": "drains",
    "check": "judges",
    "doctor": "judges",
    "setup": "setup",
    "backup": "state",
    "restore": "state",
    "image": "images",
    "dev": "development",
}
"""Each verb's module in this room."""


class Verbs(click.Group):
    """Imports a verb when it is asked for, and shows an expected error as its own words.

    All verbs together take a fifth of a second and some megabytes, which the daemon would keep.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """The names of all verbs."""
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The verb of that name, if there is one."""
        if cmd_name not in VERBS:
            return None
        verb: click.Command = getattr(import_module(f"gpud.cli.{VERBS[cmd_name]}"), cmd_name)
        return verb

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's signature
        """Run the verb."""
        # Inherited as ignored, it would make every program that is called look as if it had succeeded.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            return super().invoke(ctx)
        except GpudError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpud")
def main() -> None:
    """Sell this server's GPUs: the Supplier API daemon for one GPU server."""
