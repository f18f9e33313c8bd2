"""The daemon itself."""

from __future__ import annotations

import asyncio
import faulthandler
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click

from gpud import systemd
from gpud.cli.options import config_option
from gpud.configfile import load_config
from gpud.errors import Code, GpudError
from gpud.statefile import claim
from gpud.telemetry import set_up_logging

_STDERR = 2


@click.command()
@config_option
@click.pass_context
def serve(ctx: click.Context, config_file: Path) -> None:
    """Run the daemon.

    Exit status: 78 the configuration must be mended first, 1 another start may go better.
    """
    try:
        config = load_config(config_file)
        set_up_logging(config.log)
        faulthandler.enable(_STDERR)  # when systemd's watchdog ends it: what each thread hung in
        with ThreadPoolExecutor(1) as thread:
            claimed = thread.submit(claim, config.state_dir)
            # SQLite looks at every page of a long past meanwhile.
            from gpud import app  # noqa: PLC0415
        asyncio.run(app.serve(config, partial(load_config, config_file), claimed.result()))
    except GpudError as error:
        systemd.notify(f"STATUS={'; '.join(map(str.strip, str(error).splitlines()))}")
        if error.code is not Code.CONFIG_INVALID or error.transient:
            raise
        click.echo(f"Error: {error}", err=True)
        ctx.exit(os.EX_CONFIG)  # at which systemd does not try again
