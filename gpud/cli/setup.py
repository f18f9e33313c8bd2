"""Makes the server ready for passthrough."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from pathlib import Path

import click

from gpud.cli.options import config_option, json_option
from gpud.config import Log
from gpud.configfile import load_config
from gpud.errors import Code, GpudError
from gpud.setup import words
from gpud.setup.make import make
from gpud.setup.make import undo as take_back
from gpud.setup.plan import plan
from gpud.setup.record import load
from gpud.setup.server import Server
from gpud.telemetry import set_up_logging


@click.command()
@click.option("--dry-run", is_flag=True, help="Show what would be done, and change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do it without asking.")
@click.option("--undo", is_flag=True, help="Take back what setup made, and nothing else.")
@click.option(
    "--bind-early",
    "early",
    multiple=True,
    metavar="ADDRESS|all",
    help="Have vfio-pci hold this card from boot on. Can be repeated; replaces an earlier choice.",
)
@config_option
@json_option
@click.pass_context
def setup(
    ctx: click.Context,
    config_file: Path,
    early: tuple[str, ...],
    *,
    dry_run: bool,
    yes: bool,
    undo: bool,
    as_json: bool,
) -> None:
    """Make the changes to this server that handing GPUs to guests needs, each shown before.

    What gpud cannot know for sure, and what only the firmware can change, it says instead. Made twice,
    nothing changes.

    --json shows the plan, and changes nothing.

    Exit status: 0 nothing is left to do, 1 something is, 2 it failed, 3 a reboot is needed.
    """
    set_up_logging(Log(level="error"))
    server = Server()
    if undo and (early or as_json):
        raise click.UsageError(
            "--undo takes back everything; it goes with --dry-run and --yes only"
        )
    try:
        if not (server.is_root or dry_run or as_json):
            raise GpudError(
                Code.HOST_COMMAND_FAILED,
                "only root may change this server",
                hint="sudo gpud setup; gpud setup --dry-run only looks",
            )
        with nullcontext() if dry_run or as_json else server.alone():
            if undo:
                status = _undo(server, dry_run=dry_run, yes=yes)
            else:
                status = _setup(server, config_file, early, (dry_run, yes, as_json))
    except (GpudError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        ctx.exit(2)
    ctx.exit(status)


def _setup(
    server: Server, config_file: Path, early: tuple[str, ...], flags: tuple[bool, bool, bool]
) -> int:
    dry_run, yes, as_json = flags
    config = load_config(config_file)
    items = asyncio.run(plan(config, server, early))
    if as_json:
        told = {"items": [one.as_json() for one in items], "status": words.exit_status(items)}
        click.echo(json.dumps(told, indent=2))
        return words.exit_status(items)
    click.echo("\n".join(words.lines(items)))
    changes = [one.change for one in items if one.change is not None]
    if changes and not dry_run:
        if not (yes or click.confirm("Make these changes?")):
            click.echo("nothing was changed")
            return 1
        asyncio.run(make(changes, server, click.echo))
        items = asyncio.run(plan(config, server, early))
        click.echo()
    elif changes:
        click.echo("nothing was changed (--dry-run)")
    click.echo(words.ending(items))
    return words.exit_status(items)


def _undo(server: Server, *, dry_run: bool, yes: bool) -> int:
    record = load(server)
    made = list(record.made)
    if not (made or record.pending):
        click.echo("gpud setup has made nothing here, so there is nothing to undo")
        return 0
    click.echo("Taken back, the last first:")
    for key in reversed(made):
        click.echo(f"  {key}")
    if dry_run:
        click.echo("nothing was changed (--dry-run)")
        return 1
    if not (yes or click.confirm("Take these back?")):
        click.echo("nothing was changed")
        return 1
    undone = asyncio.run(take_back(server, click.echo))
    for what in undone.left:
        click.echo(f"left as it is: {what}; remove it by hand, or move it away")
    if undone.until_boot:
        click.echo(f"in force until a reboot: {', '.join(undone.until_boot)}")
    if undone.left:
        return 1
    return 3 if undone.until_boot else 0
