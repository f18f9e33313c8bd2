"""The configuration, and the document of the API."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

import click

from gpud import adminclient, explained
from gpud.api.web import openapi_document
from gpud.cli.options import config_option, socket_of
from gpud.configfile import load_config
from gpud.errors import Code, GpudError


@click.command()
@config_option
def reload(config_file: Path) -> None:
    """Have the daemon go by its configuration file as it is now; guests and connections go on.

    Wholly or not at all: exit status 1 means that nothing was changed, and every problem is shown.
    """
    load_config(config_file)  # what is wrong with it is told without asking the daemon
    changed = adminclient.post(socket_of(config_file), "/reload")["changed"]
    click.echo("\n".join(changed) if changed else "nothing has changed")


@click.group
def config() -> None:
    """Work on configuration files."""


@config.command("check")
@click.argument(
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/gpud/gpud.yaml"),
    envvar="GPUD_CONFIG",
)
def config_check(file: Path) -> None:
    """Judge a configuration FILE, or the daemon's; every problem is shown at once."""
    offers = load_config(file).offers
    shapes = sum(len(offer.gpu_counts) for offer in offers)
    click.echo(f"{file}: ok, {shapes} shapes on offer")


@config.command("explain")
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
def openapi() -> None:
    """Print the API's OpenAPI document."""
    click.echo(openapi_document(), nl=False)
