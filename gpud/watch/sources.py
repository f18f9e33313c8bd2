"""The parts of the daemon that are looked at, and no more of each than is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gpud.desk import OrderDesk
from gpud.guest.image import ImageStore
from gpud.inventory import Inventory
from gpud.store import Store


class Libvirt(Protocol):
    """The connection to libvirt."""

    @property
    def available(self) -> bool:
        """Whether it is connected and answers."""

    @property
    def calls_in_thread(self) -> int:
        """How many calls have not returned."""


class Keys(Protocol):
    """What tokens are judged with."""

    @property
    def ready(self) -> bool:
        """Whether a token could be judged now."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Everything that is looked at."""

    store: Store
    inventory: Inventory
    images: ImageStore
    hypervisor: Libvirt
    desk: OrderDesk
    keys: Keys
