"""The ``gpud`` command: the verbs an operator types."""

from __future__ import annotations

import click

from gpud import __version__
from gpud.cli import (
    development,
    drains,
    gpus,
    images,
    instances,
    orders,
    service,
    setup,
    state,
    status,
)
from gpud.cli.options import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpud")
def main() -> None:
    """Sell this server's GPUs: the Supplier API daemon for one GPU server."""


for _verb in (
    service.serve,
    service.reload,
    service.config_group,
    status.status,
    instances.instances,
    orders.events,
    orders.offers,
    gpus.gpus,
    drains.drain,
    drains.undrain,
    orders.console,
    service.check,
    service.doctor,
    setup.setup,
    state.backup,
    state.restore,
    service.openapi,
    images.image,
    development.dev,
):
    main.add_command(_verb)
