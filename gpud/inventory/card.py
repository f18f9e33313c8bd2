"""A card of this host as it is told to the operator: what it is, who has it, and why it is not sold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from gpud.model import Gpu, PciAddress


class CardState(StrEnum):
    """What becomes of a card at the moment."""

    AVAILABLE = "available"
    IN_USE = "in_use"
    CLEANING = "cleaning"
    DRAINED = "drained"
    QUARANTINED = "quarantined"
    UNAVAILABLE = "unavailable"


class Why(StrEnum):
    """Kinds of reasons for which a card is not sold."""

    GONE = "gone"
    NO_ANSWER = "no_answer"
    CHANGED = "changed"
    QUARANTINED = "quarantined"
    DRAINED = "drained"
    VIRTUAL = "virtual"
    NOT_A_TYPE = "not_a_type"
    MEMORY = "memory"
    IOMMU = "iommu"
    FOREIGN_DEVICE = "foreign_device"
    BOARD = "board"
    NO_DRIVER = "no_driver"
    NO_RESET = "no_reset"
    HELD = "held"
    HAND_OVER = "hand_over"
    NVML = "nvml"
    SETTING = "setting"
    UNHEALTHY = "unhealthy"
    PARTNER = "partner"


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason for which a card is not sold.

    Attributes:
        what: What is wrong, in plain words.
        mend: What to do about it; empty where there is nothing to be done but waiting.
    """

    why: Why
    what: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.what} ({self.mend})" if self.mend else self.what


def state_of_idle(why_not: Sequence[Reason]) -> CardState:
    """The state of a card that nobody has and that is not quarantined."""
    if not why_not:
        return CardState.AVAILABLE
    drained = all(one.why is Why.DRAINED for one in why_not)
    return CardState.DRAINED if drained else CardState.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Member:
    """A PCI function in one of the IOMMU groups that a card's functions are in.

    Attributes:
        ids: Vendor and device: ``10de:22ba``.
        what: Its class in words.
    """

    address: PciAddress
    ids: str
    what: str
    driver: str | None
    iommu_group: int | None

    def __str__(self) -> str:
        return f"{self.address} ({self.ids}, {self.what}, {self.driver or 'no driver'})"


@dataclass(frozen=True, slots=True)
class Health:
    """What NVML measured when it was last asked; None for what it did not tell."""

    temperature_c: int | None = None
    power_w: float | None = None
    memory_used_mib: int | None = None
    ecc_uncorrected: int | None = None
    retired_pages: int | None = None
    retirement_pending: bool | None = None
    remap_pending: bool | None = None
    vbios: str | None = None
    inforom: str | None = None


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU, sellable or not.

    What NVML once told stays: a card that a guest has is not seen by it.

    Attributes:
        ids: PCI vendor, device and subsystem: ``10de:2330 10de:16c1``; empty for a stand-in.
        gpu_type: Its GPU.ai identifier; None for a card that GPU.ai does not buy.
        group_members: Everything in its IOMMU group and in those of its companion functions.
        functions: What a guest that gets the card gets: the card, its companions, and the NVSwitches
            of its board on the card that carries them.
        nvlink_peers: GPUs that it reaches over NVLink directly.
        pcie_peers: GPUs below the same PCIe root port.
        bundle: As in :class:`~gpud.model.Gpu`, likewise ``nvlink``.
        instance: The live instance that has it.
        used_by: What else has it: ``domain NAME``, ``process PID (NAME)``.
        reasons: Everything that speaks against selling it; an instance that has it is none.
    """

    address: PciAddress
    ids: str
    state: CardState
    name: str | None = None
    gpu_type: str | None = None
    vram_mib: int | None = None
    uuid: str | None = None
    serial: str | None = None
    numa_node: int | None = None
    iommu_group: int | None = None
    group_members: tuple[Member, ...] = ()
    functions: tuple[PciAddress, ...] = ()
    driver: str | None = None
    nvlink_peers: tuple[PciAddress, ...] = ()
    pcie_peers: tuple[PciAddress, ...] = ()
    bundle: str = ""
    nvlink: str = ""
    instance: str | None = None
    used_by: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()
    health: Health = Health()
    stand_in: bool = False

    @property
    def why_not(self) -> tuple[str, ...]:
        """All reasons, each with what mends it."""
        return tuple(map(str, self.reasons))

    @property
    def holder(self) -> str | None:
        """Who has it: an instance's id, else a domain or a process."""
        return self.instance or next(iter(self.used_by), None)

    @property
    def first_faults(self) -> tuple[str, ...]:
        """The reasons against giving the card to the instance that has claimed it.

        A drain is none: it keeps a card from new orders, and this one was there before it.
        """
        return tuple(str(one) for one in self.reasons if one.why is not Why.DRAINED)

    @property
    def faults(self) -> tuple[str, ...]:
        """The reasons that hold for an instance too which has the card already.

        A quarantine is none: it keeps a card from the next instance, not from this one.
        """
        of_the_next = (Why.QUARANTINED, Why.DRAINED)
        return tuple(str(one) for one in self.reasons if one.why not in of_the_next)

    @property
    def summary(self) -> str:
        """Who has it, and of each kind of reasons one: for a cell of a table."""
        told = [f"instance {self.instance}"] if self.instance is not None else []
        by_kind: dict[Why, list[str]] = {}
        for reason in self.reasons:
            by_kind.setdefault(reason.why, []).append(reason.what)
        for first, *more in by_kind.values():
            told.append(f"{first} (and {len(more)} more)" if more else first)
        return "; ".join(told)

    @property
    def gpu(self) -> Gpu | None:
        """What the allocator is given; None where something speaks against it."""
        if self.reasons or self.gpu_type is None:
            return None
        return Gpu(
            address=self.address,
            gpu_type=self.gpu_type,
            stand_in=self.stand_in,
            functions=self.functions,
            numa_node=self.numa_node,
            bundle=self.bundle,
            nvlink=self.nvlink,
        )

    def as_json(self) -> dict[str, Any]:
        """The card for programs: ``gpud gpus --json`` and the operator's socket."""
        return {
            "address": str(self.address),
            "ids": self.ids,
            "state": self.state.value,
            "summary": self.summary,
            "why_not": list(self.why_not),
            "holder": self.holder,
            "name": self.name,
            "gpu_type": self.gpu_type,
            "vram_mib": self.vram_mib,
            "uuid": self.uuid,
            "serial": self.serial,
            "driver": self.driver,
            "numa_node": self.numa_node,
            "iommu_group": self.iommu_group,
            "group_members": [
                {
                    "address": str(member.address),
                    "ids": member.ids,
                    "class": member.what,
                    "driver": member.driver,
                    "iommu_group": member.iommu_group,
                }
                for member in self.group_members
            ],
            "functions": [str(function) for function in self.functions],
            "nvlink_peers": [str(peer) for peer in self.nvlink_peers],
            "pcie_peers": [str(peer) for peer in self.pcie_peers],
            "bundle": self.bundle or None,
            "nvlink": self.nvlink or None,
            "stand_in": self.stand_in,
            **asdict(self.health),
        }
