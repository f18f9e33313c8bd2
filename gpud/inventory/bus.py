"""Reads the PCI bus for all who ask, and tells which functions are lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from gpud.errors import Code, GpudError
from gpud.host.pci import PciTree
from gpud.model import PciAddress

_READ_S: Final = 10.0
_FRESH_S: Final = 5.0
_SILENT_S: Final = 75.0  # the kernel itself gives a function 60 s to come back from a reset
"""A guest may be resetting its card, which is silent meanwhile; a false alarm costs it its disk."""


class Bus:
    """The PCI bus.

    Args:
        read: Reads all of it; never called again before it has come to an end.
        clock: Seconds that only go forward.
    """

    def __init__(
        self, read: Callable[[], Awaitable[PciTree]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self._clock = clock
        self._turn = asyncio.Lock()
        self._next_look: asyncio.Task[PciTree] | None = None
        self._tree = PciTree({})
        self._read_at = float("-inf")
        self._silent_since: dict[PciAddress, float] = {}

    async def tree(self) -> PciTree:
        """The bus as it is now.

        While it is being read, all who come share the next read.

        Raises:
            GpudError: It cannot be read, or not within the time. Transient.
        """
        if self._next_look is None:
            self._next_look = asyncio.create_task(self._look())
        return await asyncio.shield(self._next_look)

    async def lost(
        self, addresses: Collection[PciAddress], *, fresh: bool = False
    ) -> list[PciAddress]:
        """Those that are gone from the bus, or were silent at every look for longer than a reset takes.

        However many ask, the bus is read every few seconds at most.

        Args:
            addresses: The functions.
            fresh: Read the bus after this call, however recently it was read.

        Raises:
            GpudError: As for :meth:`tree`.
        """
        if fresh or self._clock() - self._read_at > _FRESH_S:
            await self.tree()
        return [one for one in addresses if self._tree.get(one) is None or self._is_silent(one)]

    async def _look(self) -> PciTree:
        async with self._turn:
            self._next_look = None  # it begins now: who comes later wants a later one
            try:
                async with asyncio.timeout(_READ_S):
                    tree = await self._read()
            except TimeoutError as error:
                raise GpudError(
                    Code.GPU_UNUSABLE,
                    f"the PCI bus cannot be read within {_READ_S:g} s",
                    hint="a device holds up the kernel: see dmesg",
                    transient=True,
                ) from error
            self._take(tree)
            return tree

    def _take(self, tree: PciTree) -> None:
        self._tree, self._read_at = tree, self._clock()
        silent = (one.address for one in tree.functions.values() if not one.answers)
        self._silent_since = {one: self._silent_since.get(one, self._read_at) for one in silent}

    def _is_silent(self, address: PciAddress) -> bool:
        since = self._silent_since.get(address)
        return since is not None and self._read_at - since >= _SILENT_S
