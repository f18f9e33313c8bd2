"""What looks at the server: whether all is as it should be, and whether it can sell."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

import click

from gpud import adminclient, tables
from gpud.audit.look import look
from gpud.cli.options import config_option, json_option, socket_of
from gpud.config import Log
from gpud.configfile import load_config
from gpud.doctor.check import exit_status
from gpud.doctor.machine import Machine
from gpud.doctor.run import examine
from gpud.errors import GpudError
from gpud.telemetry import set_up_logging


@click.command()
@click.option("--repair", is_flag=True, help="Have the daemon remove what it would remove anyway.")
@config_option
@json_option
@click.pass_context
def check(ctx: click.Context, config_file: Path, *, repair: bool, as_json: bool) -> None:
    """Hold the record against libvirt, the kernel, the files and the daemon's own word.

    Exit status: 0 nothing found, 1 something found, 2 not everything could be looked at.
    """
    set_up_logging(Log(level="error"))
    try:
        socket = socket_of(config_file)
        if repair:
            adminclient.post(socket, "/reconcile")
        findings, not_asked = asyncio.run(look(load_config(config_file), socket))
    except GpudError as error:
        click.echo(f"Error: {error}", err=True)
        ctx.exit(2)
    if not_asked:
        click.echo(f"the daemon's answers were not compared: {not_asked}", err=True)
    tables.show_findings([asdict(finding) for finding in findings], as_json=as_json)
    ctx.exit(1 if findings else 0)


@click.command()
@config_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, config_file: Path, *, as_json: bool) -> None:
    """Look at everything that selling needs, and say what is wrong and what mends it.

    Changes nothing, and needs no running daemon. Root sees the most.

    Exit status: 0 all is well, 1 something should be mended, 2 something must be.
    """
    set_up_logging(Log(level="error"))
    try:
        config = load_config(config_file)
        verdicts = asyncio.run(examine(config, socket_of(config_file), Machine()))
    except (GpudError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        ctx.exit(2)
    tables.show_verdicts([asdict(verdict) for verdict in verdicts], as_json=as_json)
    ctx.exit(exit_status(verdicts))
