"""The whole look at a server: twice, a few seconds apart, and what both times is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from gpud import adminclient
from gpud.audit.facts import Finding, Told
from gpud.audit.judge import standing
from gpud.audit.reading import Reader, told
from gpud.config import Config
from gpud.errors import Code, GpudError
from gpud.host import capacity
from gpud.host.boot import boot_id
from gpud.host.sysfs import Sysfs
from gpud.hypervisor.libvirtd import Hypervisor

_BETWEEN_S: Final = 3.0
"""Longer than any act between two commits leaves a thing half done without the step changing."""

_CONNECT_S: Final = 10.0


async def look(config: Config, socket: Path) -> tuple[list[Finding], str]:
    """Look at this server.

    Args:
        config: The daemon's.
        socket: Where the daemon listens.

    Returns:
        What is wrong, and why the daemon was not asked; empty if it was.

    Raises:
        GpudError: Something cannot be looked at.
    """
    async with _connected(config) as hypervisor:
        measure = partial(
            capacity.measure, config.state_dir, hugepage_kib=config.guest.hugepage_kib
        )
        reader = Reader(config, hypervisor, Sysfs(), measure, boot_id())
        said, why_not = await _ask(socket)
        first = await reader.read(said)
        await asyncio.sleep(_BETWEEN_S)
        if said is not None:
            said, why_not = await _ask(socket)
        return standing(first, await reader.read(said)), why_not


async def _ask(socket: Path) -> tuple[Told | None, str]:
    """Ask the daemon, which may be down; that it is, is no fault of the server's."""
    try:
        instances = await asyncio.to_thread(adminclient.get, socket, "/instances")
        gpus = await asyncio.to_thread(adminclient.get, socket, "/gpus")
        made = await asyncio.to_thread(socket.stat)  # by the daemon, when it comes up
    except (GpudError, OSError) as error:
        return None, str(error)
    return told(instances["instances"], gpus["gpus"], made.st_mtime), ""


@asynccontextmanager
async def _connected(config: Config) -> AsyncIterator[Hypervisor]:
    hypervisor = Hypervisor(
        config.libvirt.uri, config.libvirt.call_timeout_s, config.libvirt.threads
    )
    connection = asyncio.create_task(hypervisor.run())
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(_CONNECT_S):
                await hypervisor.wait_available()
        if not hypervisor.available:
            raise GpudError(
                Code.HYPERVISOR_UNAVAILABLE,
                f"libvirt does not answer at {config.libvirt.uri} within {_CONNECT_S:g} s",
                hint="virsh -c URI list tells why; systemctl restart libvirtd",
            )
        yield hypervisor
    finally:
        connection.cancel()
        await asyncio.wait([connection])
