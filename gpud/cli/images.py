"""The images that guests are cloned from."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from gpud import tables
from gpud.cli.options import config_option, json_option
from gpud.config import Config
from gpud.configfile import load_config
from gpud.guest.image import ImageStore


@click.group()
def image() -> None:
    """Manage the guest images that instances are cloned from."""


@image.command("add")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--name", required=True, help="What guest.image in the configuration calls it.")
@click.option("--sha256", help="What the file's checksum must be.")
@config_option
def image_add(file: Path, name: str, sha256: str | None, config_file: Path) -> None:
    """Copy a qcow2 or raw FILE into the image store."""
    store = _images(load_config(config_file))
    with tables.progress(f"adding {name}") as update:
        added = asyncio.run(store.add(file, name, expected_sha256=sha256, progress=update))
    click.echo(f"{name}: {added.digest}")


@image.command("list")
@config_option
@json_option
def image_list(config_file: Path, *, as_json: bool) -> None:
    """List the images."""
    images = [
        {
            "name": ", ".join(one.names) or "-",
            "digest": one.digest,
            "size_bytes": one.size_bytes,
            "virtual_size_bytes": one.virtual_size_bytes,
            "in_use_by": one.in_use_by,
        }
        for one in _images(load_config(config_file)).list()
    ]
    tables.show(images, tables.IMAGES, "no images; `gpud image add` adds one", as_json=as_json)


@image.command("verify")
@click.argument("name")
@config_option
def image_verify(name: str, config_file: Path) -> None:
    """Read the whole image NAME, and see that it is what it was when it was added."""
    store = _images(load_config(config_file))
    with tables.progress(f"verifying {name}") as update:
        found = asyncio.run(store.verify(name, progress=update))
    click.echo(f"{name}: intact, {found.digest}")


@image.command("rm")
@click.argument("name")
@config_option
def image_rm(name: str, config_file: Path) -> None:
    """Remove the image NAME; refused while an instance uses it."""
    _images(load_config(config_file)).remove(name)
    click.echo(f"{name}: removed")


def _images(config: Config) -> ImageStore:
    return ImageStore(config.state_dir / "images")
