"""Reads the PCI bus off the event loop, where a device may hold up whoever reads it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Final

from gpud.errors import Code, GpudError
from gpud.host.pci import PciTree
from gpud.model import PciAddress

_READ_S: Final = 10.0
_FRESH_S: Final = 5.0
_ASK_AGAIN_S: Final = 1.0


class Bus:
    """The PCI bus.

    Args:
        read: Reads all of it; runs in a thread, never twice at a time.
    """

    def __init__(self, read: Callable[[], PciTree]) -> None:
        self._read = read
        self._turn = asyncio.Lock()
        self._reading: asyncio.Future[PciTree] | None = None
        self._tree = PciTree({})
        self._read_at = float("-inf")

    async def tree(self) -> PciTree:
        """The bus as it is now.

        Raises:
            GpudError: It cannot be read within the time; the reader goes on, and no second starts.
        """
        async with self._turn:
            if self._reading is None:
                self._reading = asyncio.ensure_future(asyncio.to_thread(self._read))
            await asyncio.wait({self._reading}, timeout=_READ_S)
            if not self._reading.done():
                raise GpudError(
                    Code.GPU_UNUSABLE,
                    f"the PCI bus cannot be read within {_READ_S:g} s",
                    hint="a device holds up the kernel: see dmesg",
                    transient=True,
                )
            done, self._reading = self._reading, None
            self._tree, self._read_at = done.result(), time.monotonic()
            return self._tree

    async def lost(self, addresses: Collection[PciAddress]) -> list[PciAddress]:
        """Those that are not on the bus any more, or do not answer.

        However many ask, the bus is read every few seconds at most. One that is there but silent is
        asked a second time: its guest may be resetting it.

        Raises:
            GpudError: As for :meth:`tree`.
        """
        stale = time.monotonic() - self._read_at > _FRESH_S
        tree = await self.tree() if stale else self._tree
        found = _unreachable(tree, addresses)
        if any(tree.get(address) is not None for address in found):
            await asyncio.sleep(_ASK_AGAIN_S)
            found = _unreachable(await self.tree(), found)
        return found


def _unreachable(tree: PciTree, addresses: Collection[PciAddress]) -> list[PciAddress]:
    functions = ((address, tree.get(address)) for address in addresses)
    return [address for address, one in functions if one is None or not one.answers]
