"""How the firmware placed the windows into cards' memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gpud.host.pci import PciFunction, memory_bars
from gpud.host.sysfs import Sysfs, attribute
from gpud.model import PciAddress

_4_GIB: Final = 2**32
_LARGE_BYTES: Final = 2**28
"""The window into a card's memory, which has 256 MiB unless it was resized."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Functions whose memory BARs could be better placed.

    Attributes:
        lost: A BAR has no address.
        low: A large one is below 4 GiB, although it could be above.
        small: The window has 256 MiB, and could be larger.
    """

    lost: tuple[PciAddress, ...]
    low: tuple[PciAddress, ...]
    small: tuple[PciAddress, ...]

    @classmethod
    def of(cls, functions: Sequence[PciFunction], sysfs: Sysfs) -> Placement:
        """That of some functions.

        Args:
            functions: Which.
            sysfs: The tree they were read from.
        """
        found = [
            (one.address, *window)
            for one in functions
            for window in memory_bars(sysfs.text(attribute(one.address, "resource")) or "")
        ]
        large = [window for window in found if window[3].size_bytes >= _LARGE_BYTES]
        return cls(
            lost=tuple(address for address, _, first, _ in found if not first),
            low=tuple(at for at, _, first, bar in large if bar.is_64bit and 0 < first < _4_GIB),
            small=tuple(
                address
                for address, index, _, bar in large
                if bar.size_bytes == _LARGE_BYTES
                and sysfs.exists(attribute(address, f"resource{index}_resize"))
            ),
        )
