"""A copy of the state, and its way back."""

from __future__ import annotations

from pathlib import Path

import click

from gpud.backup import back_up
from gpud.backup import restore as put_back
from gpud.cli.options import config_option
from gpud.configfile import load_config


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@config_option
def backup(file: Path, config_file: Path) -> None:
    """Write a verified copy of the state to FILE, while the daemon runs or not.

    It holds the startup scripts and keys of the guests that run: keep it as you keep secrets.
    """
    back_up(load_config(config_file).state_dir, file)
    click.echo(f"{file}: the state as of now, verified")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@config_option
def restore(file: Path, config_file: Path) -> None:
    """Put the backup FILE in the place of the state, while no daemon runs."""
    state_dir = load_config(config_file).state_dir
    kept = put_back(state_dir, file)
    click.echo(f"{state_dir}: restored from {file}")
    if kept is not None:
        click.echo(
            f"The state it replaced is kept as {kept}; it holds secrets, remove it in the end."
        )
    click.echo(
        "Now start the daemon. It sells nothing, and removes nothing that this state does not know, such"
        " as guests ordered since. `gpud check` shows them; `gpud check --repair` ends them and has it"
        " sell again."
    )
