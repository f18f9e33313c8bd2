"""The ``gpud`` command: the verbs an operator types."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from gpud import __version__, adminclient, app, tables
from gpud.api.web import openapi_document
from gpud.audit.look import look
from gpud.backup import back_up
from gpud.backup import restore as put_back
from gpud.config import Config, Log
from gpud.configfile import load_config
from gpud.dev import issuer
from gpud.doctor.check import exit_status
from gpud.doctor.machine import Machine
from gpud.doctor.run import examine
from gpud.errors import GpudError
from gpud.guest.image import ImageStore
from gpud.host.capture import capture
from gpud.host.nvml import Nvml
from gpud.telemetry import set_up_logging

F = TypeVar("F", bound=Callable[..., Any])

_SERVICE_SOCKET = Path("/run/gpud/gpud.sock")

_config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/gpud/gpud.yaml"),
    envvar="GPUD_CONFIG",
    show_default=True,
    show_envvar=True,
    help="The daemon's configuration.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class _Commands(click.Group):
    """Shows an expected error as its own words, not as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's signature
        try:
            return super().invoke(ctx)
        except GpudError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpud")
def main() -> None:
    """Sell this server's GPUs: the Supplier API daemon for one GPU server."""


@main.command()
@_config_option
def serve(config_file: Path) -> None:
    """Run the daemon."""
    config = load_config(config_file)
    set_up_logging(config.log)
    asyncio.run(app.serve(config))


@main.group("config")
def config_group() -> None:
    """Work on configuration files."""


@config_group.command("check")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def config_check(file: Path) -> None:
    """Judge a configuration FILE; every problem is shown at once."""
    config = load_config(file)
    shapes = sum(len(offer.gpu_counts) for offer in config.offers)
    click.echo(f"{file}: ok, {shapes} shapes on offer")


@main.command()
@click.option("--all", "show_ended", is_flag=True, help="Also the newest ended ones.")
@_config_option
@_json_option
def instances(config_file: Path, *, show_ended: bool, as_json: bool) -> None:
    """List instances."""
    path = "/instances?all=1" if show_ended else "/instances"
    answer = adminclient.get(_socket(config_file), path)
    tables.show(answer["instances"], tables.INSTANCES, "no instances", as_json=as_json)


@main.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--instance", "instance_id", metavar="ID", help="Only of this instance.")
@click.option("--gpu", "address", metavar="ADDRESS", help="Only of the GPU at this address.")
@click.option("-n", "count", type=click.IntRange(1, 10_000), default=50, show_default=True,
              metavar="COUNT", help="How many of those that were.")  # fmt: skip
@_config_option
@_json_option
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
    socket = _socket(config_file)
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


@main.command()
@_config_option
@_json_option
def offers(config_file: Path, *, as_json: bool) -> None:
    """List what is on offer, and how much of it could be sold right now."""
    answer = adminclient.get(_socket(config_file), "/offers")
    tables.show(answer["offerings"], tables.OFFERS, "nothing is on offer", as_json=as_json)


@main.group(invoke_without_command=True)
@_config_option
@_json_option
@click.pass_context
def gpus(ctx: click.Context, config_file: Path, *, as_json: bool) -> None:
    """List the GPUs, and for each that cannot be sold, why not."""
    if ctx.invoked_subcommand is None:
        answer = adminclient.get(_socket(config_file), "/gpus")
        tables.show(answer["gpus"], tables.GPUS, "this server has no GPU", as_json=as_json)
        if not as_json:
            tables.show_why_not(answer["gpus"])


@gpus.command("quarantine")
@click.argument("address")
@click.option("--reason", required=True, help="Shown wherever the GPU is.")
@_config_option
def gpus_quarantine(address: str, reason: str, config_file: Path) -> None:
    """Sell the GPU at ADDRESS no more; an instance that has it keeps it."""
    _act_on_gpu(config_file, address, "quarantine", {"reason": reason})


@gpus.command("release")
@click.argument("address")
@_config_option
def gpus_release(address: str, config_file: Path) -> None:
    """End the quarantine of the GPU at ADDRESS, after a look at it."""
    _act_on_gpu(config_file, address, "release")


@gpus.command("confirm")
@click.argument("address")
@_config_option
def gpus_confirm(address: str, config_file: Path) -> None:
    """Take the card that is at ADDRESS now for the right one, after a swap."""
    _act_on_gpu(config_file, address, "confirm")


@main.command()
@click.argument("instance_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the instance ends.")
@_config_option
def console(instance_id: str, config_file: Path, *, follow: bool) -> None:
    """Show what the guest of instance ID has printed on its serial console."""
    adminclient.copy(_socket(config_file), adminclient.console_path(instance_id, follow=follow),
                     sys.stdout.buffer)  # fmt: skip


@main.command()
@click.option("--repair", is_flag=True, help="Have the daemon remove what it would remove anyway.")
@_config_option
@_json_option
@click.pass_context
def check(ctx: click.Context, config_file: Path, *, repair: bool, as_json: bool) -> None:
    """Hold the record against libvirt, the kernel, the files and the daemon's own word.

    Exit status: 0 nothing found, 1 something found, 2 not everything could be looked at.
    """
    set_up_logging(Log(level="error"))
    try:
        socket = _socket(config_file)
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


@main.command()
@_config_option
@_json_option
@click.pass_context
def doctor(ctx: click.Context, config_file: Path, *, as_json: bool) -> None:
    """Look at everything that selling needs, and say what is wrong and what mends it.

    Changes nothing, and needs no running daemon. Root sees the most.

    Exit status: 0 all is well, 1 something should be mended, 2 something must be.
    """
    set_up_logging(Log(level="error"))
    try:
        config = load_config(config_file)
        verdicts = asyncio.run(examine(config, _socket(config_file), Machine()))
    except (GpudError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        ctx.exit(2)
    tables.show_verdicts([asdict(verdict) for verdict in verdicts], as_json=as_json)
    ctx.exit(exit_status(verdicts))


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@_config_option
def backup(file: Path, config_file: Path) -> None:
    """Write a verified copy of the state to FILE, while the daemon runs or not.

    It holds the startup scripts and keys of the guests that run: keep it as you keep secrets.
    """
    back_up(load_config(config_file).state_dir, file)
    click.echo(f"{file}: the state as of now, verified")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@_config_option
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


@main.command()
def openapi() -> None:
    """Print the API's OpenAPI document."""
    click.echo(openapi_document(), nl=False)


@main.group()
def image() -> None:
    """Manage the guest images that instances are cloned from."""


@image.command("add")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--name", required=True, help="What guest.image in the configuration calls it.")
@click.option("--sha256", help="What the file's checksum must be.")
@_config_option
def image_add(file: Path, name: str, sha256: str | None, config_file: Path) -> None:
    """Copy a qcow2 or raw FILE into the image store."""
    store = _images(load_config(config_file))
    with tables.progress(f"adding {name}") as update:
        added = asyncio.run(store.add(file, name, expected_sha256=sha256, progress=update))
    click.echo(f"{name}: {added.digest}")


@image.command("list")
@_config_option
@_json_option
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
@_config_option
def image_verify(name: str, config_file: Path) -> None:
    """Read the whole image NAME, and see that it is what it was when it was added."""
    store = _images(load_config(config_file))
    with tables.progress(f"verifying {name}") as update:
        found = asyncio.run(store.verify(name, progress=update))
    click.echo(f"{name}: intact, {found.digest}")


@image.command("rm")
@click.argument("name")
@_config_option
def image_rm(name: str, config_file: Path) -> None:
    """Remove the image NAME; refused while an instance uses it."""
    _images(load_config(config_file)).remove(name)
    click.echo(f"{name}: removed")


@main.group()
def dev() -> None:
    """Tools for development; never for a server that sells."""


@dev.command("issuer")
@click.option("--port", type=click.IntRange(0, 65535), default=9876, show_default=True)
@click.option("--client-id", default="gpu-ai", show_default=True)
@click.option("--client-secret", default="development", show_default=True)
@click.option("--audience", default="gpud", show_default=True)
def dev_issuer(port: int, client_id: str, client_secret: str, audience: str) -> None:
    """Run a small OAuth2 token endpoint on loopback (client credentials, JWKS)."""
    asyncio.run(issuer.serve("127.0.0.1", port, client_id, client_secret, audience))


@dev.command("capture-host")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def dev_capture_host(directory: Path) -> None:
    """Record this server's cards in DIRECTORY, without serials, as data for a test of gpud."""
    report = asyncio.run(Nvml().report())
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in capture(Path("/sys"), Path("/proc"), report).items():
        (directory / name).write_text(text)
        click.echo(directory / name)


def _act_on_gpu(
    config_file: Path, address: str, act: str, body: dict[str, str] | None = None
) -> None:
    answer = adminclient.post(_socket(config_file), adminclient.gpu_path(address, act), body)
    rows = [answer["gpu"]] if answer["gpu"] else []
    tables.show(rows, tables.GPUS, f"no GPU is at {address} now", as_json=False)


def _socket(config_file: Path) -> Path:
    """Where the daemon listens, which knows its runtime directory from systemd; this command does not."""
    expected = load_config(config_file).admin_socket_path
    return expected if expected.exists() or not _SERVICE_SOCKET.exists() else _SERVICE_SOCKET


def _images(config: Config) -> ImageStore:
    return ImageStore(config.state_dir / "images")
