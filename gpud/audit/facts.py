"""What the audit judges: the record, and what is really there. Types only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from gpud.config import Config
from gpud.drains import Drain
from gpud.host.capacity import Capacity
from gpud.hypervisor.domains import Domain
from gpud.hypervisor.networkxml import Lease
from gpud.model import Instance, PciAddress, Quarantine


class Kind(StrEnum):
    """What a finding means for the business."""

    LEAK = "leak"
    DOUBLE_CLAIM = "double claim"
    LOST_ORDER = "lost order"
    CONTRADICTION = "contradiction"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it has to be.

    Attributes:
        subject: What it is about; the instance's id is in it, where it is about an instance.
        what: What is wrong. Two looks at the same fault find the same words.
        mend: What to do: a command where one does it.
        repairable: The reconciler removes it.
    """

    kind: Kind
    subject: str
    what: str
    mend: str
    repairable: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """The state file, as of one moment.

    Attributes:
        live: Instances that may still hold something, by ``upstream_id``.
        failed: Ended instances with status ``error``, whose consoles are kept for a while.
        gpu_claims: The instance that each claimed GPU is claimed for.
        address_claims: Likewise of addresses.
        guest_inputs: Instances of which keys and script are kept.
        drains: By address; the whole server's under None.
        noted: The driver that each PCI function had when gpud last took it in this boot of the server.
    """

    owner: str
    live: Mapping[str, Instance] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()
    gpu_claims: Mapping[str, str] = field(default_factory=dict)
    address_claims: Mapping[str, str] = field(default_factory=dict)
    guest_inputs: frozenset[str] = frozenset()
    quarantines: Mapping[PciAddress, Quarantine] = field(default_factory=dict)
    drains: Mapping[PciAddress | None, Drain] = field(default_factory=dict)
    noted: Mapping[PciAddress, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToldCard:
    """A card as the daemon shows it.

    Attributes:
        state: A :class:`~gpud.inventory.card.CardState`.
        why_not: The reasons given for not selling it.
    """

    address: str
    state: str
    why_not: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Told:
    """What the daemon says.

    Attributes:
        since: When it came up, in seconds since the epoch.
        places: Each live instance's status and step: ``running/running``.
        cards: Every card.
    """

    since: float
    places: Mapping[str, str]
    cards: tuple[ToldCard, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it, as of about one moment: the record first, so that nothing younger than it is accused.

    Attributes:
        now: Seconds since the epoch.
        domains: Every active domain of the host.
        passed: The PCI functions that active domains have, each with its domain's name.
        directories: Names of the files in each instance's directory.
        consoles: The guests of which there is output.
        leases: The fixed addresses that the guests' network gives out.
        drivers: The driver of each function that the record names; None for none.
        overrides: What overrides the choice of a driver, of those of them that nobody has.
        told: None when no daemon answers.
    """

    config: Config
    now: float
    record: Record
    capacity: Capacity
    domains: tuple[Domain, ...] = ()
    passed: Mapping[PciAddress, str] = field(default_factory=dict)
    directories: Mapping[str, frozenset[str]] = field(default_factory=dict)
    consoles: frozenset[str] = frozenset()
    leases: tuple[Lease, ...] = ()
    drivers: Mapping[PciAddress, str | None] = field(default_factory=dict)
    overrides: Mapping[PciAddress, str] = field(default_factory=dict)
    told: Told | None = None


def place(instance: Instance) -> str:
    """Status and step in one word."""
    return f"{instance.status.value}/{instance.step.value}"
