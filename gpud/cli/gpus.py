"""The server's GPUs."""

from __future__ import annotations

from pathlib import Path

import click

from gpud import adminclient, tables
from gpud.cli.options import config_option, json_option, socket_of
from gpud.cli.showing import present, watch_option


@click.group(invoke_without_command=True)
@config_option
@json_option
@watch_option
@click.pass_context
def gpus(ctx: click.Context, config_file: Path, *, as_json: bool, watch: bool) -> None:
    """List the GPUs, and for each that cannot be sold, why not."""
    if ctx.invoked_subcommand is not None:
        return
    present(
        lambda: adminclient.get(socket_of(config_file), "/gpus")["gpus"],
        lambda rows: tables.Listing(
            rows, tables.GPUS, "this server has no GPU", tables.card_reasons(rows)
        ),
        as_json=as_json,
        watch=watch,
    )


@gpus.command("quarantine")
@click.argument("address")
@click.option("--reason", required=True, help="Shown wherever the GPU is.")
@config_option
def gpus_quarantine(address: str, reason: str, config_file: Path) -> None:
    """Sell the GPU at ADDRESS no more; an instance that has it keeps it."""
    _act_on_gpu(config_file, address, "quarantine", {"reason": reason})


@gpus.command("release")
@click.argument("address")
@config_option
def gpus_release(address: str, config_file: Path) -> None:
    """End the quarantine of the GPU at ADDRESS, after a look at it."""
    _act_on_gpu(config_file, address, "release")


@gpus.command("confirm")
@click.argument("address")
@config_option
def gpus_confirm(address: str, config_file: Path) -> None:
    """Take the card that is at ADDRESS now for the right one, after a swap."""
    _act_on_gpu(config_file, address, "confirm")


def _act_on_gpu(
    config_file: Path, address: str, act: str, body: dict[str, str] | None = None
) -> None:
    answer = adminclient.post(socket_of(config_file), adminclient.gpu_path(address, act), body)
    tables.show_gpu(answer["gpu"], address)
