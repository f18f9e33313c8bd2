"""The PCI bus with its devices' own answers, whatever state they are in."""

from __future__ import annotations

import asyncio
from typing import Final

from gpud.host import pci
from gpud.host.pci import PciTree
from gpud.host.sysfs import Sysfs

_ANSWER_S: Final = 2.0
"""A reset of a bus takes little more than a second, and no reader gets an answer while it lasts."""


async def read(sysfs: Sysfs, limit_s: float = _ANSWER_S) -> PciTree:
    """Read all PCI functions of the host, and ask each but the bridges who it is.

    A function that does not answer within ``limit_s`` has no header. One of those costs up to three
    times that, once; while it stays stuck it is not asked again.

    Raises:
        GpudError: Not one answers, or the bus cannot be read. Transient.
    """
    tree = await asyncio.to_thread(pci.read, sysfs.root)
    endpoints = [one.address for one in tree.functions.values() if not one.is_bridge]
    return tree.with_headers(await sysfs.config_headers(endpoints, limit_s))
