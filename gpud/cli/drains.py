"""Keeping cards, or the whole server, from new orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gpud import adminclient, tables
from gpud.cli.options import config_option, socket_of

_gpu_option = click.option("--gpu", "address", metavar="ADDRESS", help="One GPU.")
_all_option = click.option("--all", "whole_server", is_flag=True, help="The whole server.")


@click.command()
@_gpu_option
@_all_option
@click.option("--reason", default="", help="Shown wherever the drain is.")
@config_option
def drain(address: str | None, reason: str, config_file: Path, *, whole_server: bool) -> None:
    """Give a GPU, or the whole server, no new orders. Instances stay; restarts change nothing.

    A GPU that is swapped stays drained: its place is what is drained. One that is taken out for good,
    which `gpud gpus confirm` says, is not.
    """
    answer = _ask(config_file, "drain", address, {"reason": reason}, whole_server=whole_server)
    if whole_server:
        click.echo(f"the server takes no new orders; {_staying(answer['instances'])}")
    else:
        tables.show_gpu(answer["gpu"], str(address))


@click.command()
@_gpu_option
@_all_option
@config_option
def undrain(address: str | None, config_file: Path, *, whole_server: bool) -> None:
    """Sell a drained GPU, or the drained server, again.

    GPUs that were drained one by one stay so when the whole server's drain ends.
    """
    answer = _ask(config_file, "undrain", address, {}, whole_server=whole_server)
    if whole_server:
        click.echo("the server is no longer drained" if answer["ended"] else "it was not drained")
        for left in answer["drains"]:
            click.echo(f"GPU {left['gpu']} stays drained: gpud undrain --gpu {left['gpu']}")
        return
    if not answer["ended"]:
        click.echo(f"GPU {address} was not drained")
    tables.show_gpu(answer["gpu"], str(address))


def _ask(
    config_file: Path, act: str, address: str | None, body: dict[str, str], *, whole_server: bool
) -> Any:  # noqa: ANN401 - whatever JSON the daemon answers
    if (address is None) is not whole_server:
        raise click.UsageError("say either --gpu ADDRESS or --all")
    path = f"/{act}" if address is None else adminclient.gpu_path(address, act)
    return adminclient.post(socket_of(config_file), path, body)


def _staying(instances: list[str]) -> str:
    if not instances:
        return "no instance is on it"
    if len(instances) == 1:
        return "1 instance stays: gpud instances"
    return f"{len(instances)} instances stay: gpud instances"
