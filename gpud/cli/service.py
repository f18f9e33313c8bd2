"""The daemon itself, its configuration, and its judges."""

from __future__ import annotations

import asyncio
import faulthandler
import os
from dataclasses import asdict
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import click

from gpud import adminclient, app, explained, systemd, tables
from gpud.api.web import openapi_document
from gpud.audit.look import look
from gpud.cli.options import config_option, json_option, socket_of
from gpud.config import Log
from gpud.configfile import load_config
from gpud.doctor.check import exit_status
from gpud.doctor.machine import Machine
from gpud.doctor.run import examine
from gpud.errors import Code, GpudError
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
        asyncio.run(app.serve(config, partial(load_config, config_file)))
    except GpudError as error:
        systemd.notify(f"STATUS={'; '.join(map(str.strip, str(error).splitlines()))}")
        if error.code is not Code.CONFIG_INVALID or error.transient:
            raise
        click.echo(f"Error: {error}", err=True)
        ctx.exit(os.EX_CONFIG)  # at which systemd does not try again


@click.command()
@config_option
def reload(config_file: Path) -> None:
    """Have the daemon go by its configuration file as it is now; guests and connections go on.

    Wholly or not at all: exit status 1 means that nothing was changed, and every problem is shown.
    """
    changed = adminclient.post(socket_of(config_file), "/reload")["changed"]
    click.echo("\n".join(changed) if changed else "nothing has changed")


@click.group("config")
def config_group() -> None:
    """Work on configuration files."""


@config_group.command("check")
@click.argument(
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/gpud/gpud.yaml"),
    envvar="GPUD_CONFIG",
)
def config_check(file: Path) -> None:
    """Judge a configuration FILE, or the daemon's; every problem is shown at once."""
    config = load_config(file)
    shapes = sum(len(offer.gpu_counts) for offer in config.offers)
    click.echo(f"{file}: ok, {shapes} shapes on offer")


@config_group.command("explain")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
def config_explain(keys: tuple[str, ...]) -> None:
    """Tell what a KEY such as server.tls means, what it may be, and its default; without one, all."""
    if not keys:
        click.echo(explained.document(), nl=False)
        return
    known = list(explained.topics())
    for key in keys:
        if not any(one.is_about(key) for one in known):
            paths = [one.path for topic in known for one in topic.keys]
            near = ", ".join(get_close_matches(key, paths)) or "gpud config explain shows all"
            raise GpudError(Code.CONFIG_INVALID, f"there is no key {key}", hint=near)
    click.echo("\n\n".join(str(one) for one in known if any(map(one.is_about, keys))))


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


@click.command()
def openapi() -> None:
    """Print the API's OpenAPI document."""
    click.echo(openapi_document(), nl=False)
