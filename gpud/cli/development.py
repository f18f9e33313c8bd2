"""Verbs for who works on gpud."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from gpud.dev import issuer
from gpud.host.capture import capture
from gpud.host.nvml import Nvml


@click.group()
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
