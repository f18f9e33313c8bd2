"""What the merge works from: the host's own word, and the record's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from gpud.drains import Drain
from gpud.host.iommu import IommuFacts
from gpud.host.nvml import NvmlGpu
from gpud.host.obstacle import Obstacle
from gpud.host.pci import PciTree
from gpud.inventory.card import CardState
from gpud.model import RELEASE_STEPS, KnownCard, PciAddress, Quarantine
from gpud.store import Store


@dataclass(frozen=True, slots=True)
class NvmlView:
    """What NVML told last.

    Attributes:
        gpus: Its GPUs. Where it last had no answer, those of the answer before.
        silent: Cards that its driver had while it answered, and of which it said nothing.
        unplaced: Faults of cards whose address NVML could not learn.
        awaited: It has not been heard at all yet, and should be.
    """

    gpus: Mapping[PciAddress, NvmlGpu] = field(default_factory=dict)
    silent: frozenset[PciAddress] = frozenset()
    unplaced: tuple[str, ...] = ()
    awaited: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What the host says of itself.

    Attributes:
        domains: Domains of libvirt that have a PCI function, by its address.
        obstacles: What the hand-over says against each card that no instance has.
    """

    tree: PciTree
    iommu: IommuFacts
    nvml: NvmlView = NvmlView()
    domains: Mapping[PciAddress, str] = field(default_factory=dict)
    obstacles: Mapping[PciAddress, tuple[Obstacle, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Claim:
    """A live instance that has a card.

    Attributes:
        releasing: It is being given back.
    """

    upstream_id: str
    releasing: bool

    @property
    def state(self) -> CardState:
        """What the claim makes of the card."""
        return CardState.CLEANING if self.releasing else CardState.IN_USE


@dataclass(frozen=True, slots=True)
class Record:
    """What the store says of the cards.

    Attributes:
        drains: By address; the whole server's under None.
    """

    known: Mapping[PciAddress, KnownCard] = field(default_factory=dict)
    quarantines: Mapping[PciAddress, Quarantine] = field(default_factory=dict)
    claims: Mapping[PciAddress, Claim] = field(default_factory=dict)
    drains: Mapping[PciAddress | None, Drain] = field(default_factory=dict)

    def drains_of(self, address: PciAddress) -> tuple[Drain, ...]:
        """What keeps a card from new orders: its own drain, the whole server's."""
        return tuple(self.drains[one] for one in (address, None) if one in self.drains)

    @classmethod
    def of(cls, store: Store) -> Self:
        """The record as of the last commit; may be called on any thread."""
        claims = {
            gpu.address: Claim(instance.upstream_id, instance.step in RELEASE_STEPS)
            for instance in store.live.values()
            for gpu in instance.grant.gpus
        }
        return cls(store.known_cards, store.quarantines, claims, store.drains)
