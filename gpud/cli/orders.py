"""What is for sale, what happened, and what guests print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from gpud import adminclient, tables
from gpud.cli.options import config_option, json_option, socket_of
from gpud.cli.showing import present, watch_option
from gpud.screens.terminal import SafeTerminal


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--instance", "instance_id", metavar="ID", help="Only of this instance.")
@click.option("--gpu", "address", metavar="ADDRESS", help="Only of the GPU at this address.")
@click.option("-n", "count", type=click.IntRange(1, 10_000), default=50, show_default=True,
              metavar="COUNT", help="How many of those that were.")  # fmt: skip
@config_option
@json_option
def events(
    config_file: Path,
    instance_id: str | None,
    address: str | None,
    count: int,
    *,
    follow: bool,
    as_json: bool,
) -> None:
    """Show what happened to instances and GPUs, newest last."""
    socket = socket_of(config_file)
    asked = {"instance": instance_id, "gpu": address}
    wanted = {key: value for key, value in asked.items() if value is not None}
    path = adminclient.events_path({**wanted, "limit": str(count)})
    past = adminclient.get(socket, path)["events"]
    if as_json and not follow:
        click.echo(json.dumps(past, indent=2))
        return
    show: Callable[[Any], str] = json.dumps if as_json else tables.event_line
    for event in past:
        click.echo(show(event))
    if not follow:
        return
    coming = adminclient.follow_events(
        socket, wanted, past[-1]["id"] if past else 0, partial(click.echo, err=True)
    )
    with suppress(KeyboardInterrupt):
        for event in coming:
            click.echo(show(event))


@click.command()
@config_option
@json_option
@watch_option
def offers(config_file: Path, *, as_json: bool, watch: bool) -> None:
    """List what is on offer, how much of it could be sold right now, and why some could not."""
    present(
        lambda: adminclient.get(socket_of(config_file), "/offers")["offerings"],
        lambda rows: tables.Listing(
            rows, tables.OFFERS, "nothing is on offer", tables.offer_reasons(rows)
        ),
        as_json=as_json,
        watch=watch,
    )


@click.command()
@click.argument("instance_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the instance ends.")
@config_option
def console(instance_id: str, config_file: Path, *, follow: bool) -> None:
    """Show what the guest of instance ID has printed on its serial console."""
    path = adminclient.console_path(instance_id, follow=follow)
    if not sys.stdout.isatty():
        adminclient.copy(socket_of(config_file), path, sys.stdout.buffer)
        return
    with closing(SafeTerminal(sys.stdout.buffer)) as terminal:
        adminclient.copy(socket_of(config_file), path, terminal)
