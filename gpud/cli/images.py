"""The images that guests are cloned from."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

import click

from gpud import tables
from gpud.cli.options import config_option, json_option
from gpud.config import Config, Log
from gpud.configfile import load_config
from gpud.doctor.check import Verdict, exit_status
from gpud.golden import judge, seal
from gpud.guest.image import ImageStore
from gpud.guest.intake import Judge
from gpud.telemetry import set_up_logging

_firmware_option = click.option(
    "--firmware",
    type=click.Choice(["uefi", "bios"]),
    default="uefi",
    show_default=True,
    help="What guests start with: guest.firmware in the configuration.",
)


@click.group()
def image() -> None:
    """Manage the guest images that instances are cloned from."""


@image.command("add")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--name", required=True, help="What guest.image in the configuration calls it.")
@click.option("--sha256", help="What the file's checksum must be.")
@click.option("--unsealed", is_flag=True, help="Take it in without looking into it.")
@config_option
def image_add(
    file: Path, name: str, sha256: str | None, config_file: Path, *, unsealed: bool
) -> None:
    """Copy a qcow2 or raw FILE into the image store; refused where it is not fit to be cloned."""
    set_up_logging(Log(level="error"))
    config = load_config(config_file)

    async def fit(copy: Path) -> None:
        for one in await seal.refuse_unfit(copy, config.guest.firmware):
            click.echo(f"warning: {one.name}: {one.what}", err=True)

    look: Judge | None = None if unsealed else fit
    with tables.progress(f"adding {name}") as update:
        added = asyncio.run(_images(config).add(file, name, sha256, update, look))
    click.echo(f"{name}: {added.digest}")


@image.command("check")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_firmware_option
@json_option
@click.pass_context
def image_check(ctx: click.Context, file: Path, firmware: judge.Firmware, *, as_json: bool) -> None:
    """Look whether the image FILE is fit to be cloned, and has what gpud needs.

    Nothing is changed, and neither root nor a configuration is needed.

    Exit status: 0 all is well, 1 something should be mended, 2 something must be.
    """
    verdicts = asyncio.run(seal.check(file, firmware))
    _show(verdicts, as_json=as_json)
    ctx.exit(exit_status(verdicts))


@image.command("seal")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--in-place", is_flag=True, help="Replace FILE.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Where the sealed copy goes.")  # fmt: skip
@_firmware_option
@json_option
@click.pass_context
def image_seal(
    ctx: click.Context,
    file: Path,
    output: Path | None,
    firmware: judge.Firmware,
    *,
    in_place: bool,
    as_json: bool,
) -> None:
    """Remove from the image FILE what its clones must not share: ids, keys, logs, histories, caches.

    What is removed cannot be read back from the copy. Where faults remain that sealing cannot mend,
    nothing is written, and the exit status is 2.
    """
    if in_place == (output is not None):
        raise click.UsageError("say either --in-place or --output FILE")
    verdicts = asyncio.run(seal.seal(file, output or file, firmware))
    _show(verdicts, as_json=as_json)
    if judge.faults(verdicts):
        click.echo(f"{output or file}: not written", err=True)
        ctx.exit(2)


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
            "sealed": one.sealed,
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


def _show(verdicts: list[Verdict], *, as_json: bool) -> None:
    tables.show_verdicts([asdict(one) for one in verdicts], as_json=as_json)


def _images(config: Config) -> ImageStore:
    return ImageStore(config.state_dir / "images")
