"""Why a card is not sold: every reason at once, each with what mends it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import Final

from gpud.config import Gpus
from gpud.drains import Drain
from gpud.host import iommu
from gpud.host.pci import NVIDIA_DRIVER, PciFunction
from gpud.inventory import pciclass
from gpud.inventory.card import Member, Reason, Why
from gpud.inventory.facts import Facts
from gpud.inventory.groups import is_virtual
from gpud.inventory.sighting import Sighting
from gpud.model import GPU_TYPES, Quarantine

_MEMORY_TOLERANCE: Final = 0.1
"""What NVML calls memory is up to 7 % below the name of the card: ECC and the driver take some."""

_MATTERS_WHILE_CLAIMED: Final = frozenset(
    {
        Why.GONE,
        Why.NO_ANSWER,
        Why.CHANGED,
        Why.QUARANTINED,
        Why.DRAINED,
        Why.IOMMU,
        Why.FOREIGN_DEVICE,
        Why.SETTING,
        Why.UNHEALTHY,
    }
)
"""The others are the doing of the instance that has the card, or of a config that changed since."""


def reasons(
    sighting: Sighting, facts: Facts, config: Gpus, partners: Collection[Sighting]
) -> tuple[Reason, ...]:
    """What speaks against selling a card, its partners' own faults left out.

    Args:
        sighting: The card.
        facts: What the host says.
        config: What the operator says.
        partners: The cards that it is only ever given out together with.
    """
    function = sighting.function
    if function is not None and is_virtual(function):
        return (_virtual_function(),)
    found = [*_record(sighting), *_kind(sighting, config)]
    if function is None:
        found.append(_gone(sighting))
    else:
        found += _bus(sighting, facts)
        found += _isolation(function, facts)
        found += (_foreign(one) for one in foreign_devices(sighting, config, partners))
        found += _board(sighting, facts, config)
        found += _driver(function, facts)
        if not function.reset_methods:
            found.append(Reason(Why.NO_RESET, "cannot be reset, so no guest may follow another"))
    found += (Reason(Why.HELD, f"used by {other}", "stop it") for other in used_by(sighting))
    found += _nvml(sighting)
    if sighting.claim is not None:
        found = [one for one in found if one.why in _MATTERS_WHILE_CLAIMED]
    return tuple(found)


def obstacles(sighting: Sighting, facts: Facts) -> tuple[Reason, ...]:
    """What the hand-over itself says against a card that nothing else speaks against."""
    if sighting.claim is not None:
        return ()
    return tuple(
        Reason(Why.HELD if one.users else Why.HAND_OVER, one.what, one.mend)
        for one in facts.obstacles.get(sighting.address, ())
    )


def foreign_devices(
    sighting: Sighting, config: Gpus, partners: Collection[Sighting]
) -> tuple[PciFunction, ...]:
    """What is in a card's IOMMU groups and belongs to none of the cards that go together."""
    together = {one.address for card in (sighting, *partners) for one in card.functions}
    return tuple(
        one
        for one in sighting.surroundings
        if one.address not in together
        and not one.is_inert
        and not (one.is_nvswitch and sighting.on_board and config.nvswitch_board == "whole")
    )


def member(function: PciFunction) -> Member:
    """A function as a member of its IOMMU group."""
    what = "NVSwitch" if function.is_nvswitch else pciclass.in_words(function.class_code)
    return Member(function.address, function.ids, what, function.driver, function.iommu_group)


def holders(sighting: Sighting, facts: Facts) -> tuple[str, ...]:
    """What has the card without being the instance that it was given to."""
    told = () if sighting.claim is not None else facts.obstacles.get(sighting.address, ())
    # NVML sees more than procfs shows an ordinary user, but not what uses no CUDA or graphics.
    return used_by(sighting) or tuple(user for one in told for user in one.users)


def used_by(sighting: Sighting) -> tuple[str, ...]:
    """What libvirt and NVML say has it, without being the instance that it was given to."""
    if sighting.claim is not None:
        return ()
    domain = (f"domain {sighting.domain}",) if sighting.domain is not None else ()
    processes = sighting.seen.processes if sighting.seen is not None else ()
    return (*domain, *(f"process {process.pid} ({process.name})" for process in processes))


def quarantined(quarantine: Quarantine) -> Reason:
    """Why a card in quarantine is not sold."""
    return Reason(
        Why.QUARANTINED,
        f"quarantined since {_when(quarantine.since)}: {quarantine.reason}",
        f"after a look at it: gpud gpus release {quarantine.address}",
    )


def drained(drain: Drain) -> Reason:
    """Why a card that is drained, or whose server is, gets no new order."""
    which = f"--gpu {drain.address}" if drain.address is not None else "--all"
    whose = "" if drain.address is not None else "the server is "
    reason = f": {drain.reason}" if drain.reason else ""
    what = f"{whose}drained since {_when(drain.since)}{reason}"
    return Reason(Why.DRAINED, what, f"undrain: gpud undrain {which}")


def _when(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"


def _record(sighting: Sighting) -> Iterator[Reason]:
    if sighting.quarantine is not None:
        yield quarantined(sighting.quarantine)
    yield from map(drained, sighting.drains)


def _kind(sighting: Sighting, config: Gpus) -> Iterator[Reason]:
    if sighting.gpu_type is None:
        yield Reason(
            Why.NOT_A_TYPE,
            f"not a GPU.ai type ({sighting.ids or 'ids unknown'})",
            f'if it is one: gpus.pci_ids: {{"{sighting.pci_ids}": TYPE}}' if sighting.ids else "",
        )
        return
    expected_mib = GPU_TYPES[sighting.gpu_type].vram_gb * 1024
    vram_mib = sighting.vram_mib
    if vram_mib and abs(vram_mib - expected_mib) > expected_mib * _MEMORY_TOLERANCE:
        mapped = sighting.pci_ids in config.pci_ids
        yield Reason(
            Why.MEMORY,
            f"has {vram_mib} MiB of memory, which no {sighting.gpu_type} has",
            f'mend gpus.pci_ids: "{sighting.pci_ids}"' if mapped else "",
        )


def _gone(sighting: Sighting) -> Reason:
    return Reason(
        Why.GONE,
        "fell off the bus",
        "look at dmesg, switch the server off and on;"
        f" if the card was taken out: gpud gpus confirm {sighting.address}",
    )


def _virtual_function() -> Reason:
    return Reason(
        Why.VIRTUAL, "a virtual function of another card", "whole cards are sold; turn vGPU off"
    )


def _bus(sighting: Sighting, facts: Facts) -> Iterator[Reason]:
    for function in sighting.functions:
        if not function.answers:
            which = "" if function.address == sighting.address else f"its {_named(function)} "
            yield Reason(Why.NO_ANSWER, f"{which}does not answer", "look at dmesg; reset the card")
    bus = (sighting.address.domain, sighting.address.bus)
    virtual = [
        one.address
        for one in facts.tree.functions.values()
        if (one.address.domain, one.address.bus) == bus and is_virtual(one)
    ]
    if virtual:
        yield Reason(
            Why.VIRTUAL,
            f"has virtual functions (vGPU), from {min(virtual)} on",
            f"echo 0 > /sys/bus/pci/devices/{sighting.address}/sriov_numvfs",
        )


def _isolation(function: PciFunction, facts: Facts) -> Iterator[Reason]:
    for one in iommu.obstacles(facts.iommu):
        yield Reason(Why.IOMMU, one.what, one.mend)
    if facts.iommu.present and function.iommu_group is None:
        yield Reason(Why.IOMMU, "in no IOMMU group", "see dmesg | grep -i iommu")
    if facts.iommu.acs_override:
        yield Reason(
            Why.IOMMU,
            "pcie_acs_override splits IOMMU groups that the hardware does not keep apart",
            "take it off the kernel command line",
        )


def _foreign(function: PciFunction) -> Reason:
    return Reason(
        Why.FOREIGN_DEVICE,
        f"foreign device in IOMMU group {function.iommu_group}: {member(function)}",
        "turn on ACS in the firmware, or move one of the two to another slot",
    )


def _board(sighting: Sighting, facts: Facts, config: Gpus) -> Iterator[Reason]:
    if not sighting.on_board:
        return
    if config.nvswitch_board == "refuse":
        yield Reason(
            Why.BOARD,
            "on an NVSwitch board",
            "gpus.nvswitch_board: single or whole says how to sell it",
        )
    elif config.nvswitch_board == "whole" and not any(
        one.is_nvswitch for one in facts.tree.functions.values()
    ):
        yield Reason(Why.BOARD, "the NVSwitches of its board are not on the bus")


def _driver(function: PciFunction, facts: Facts) -> Iterator[Reason]:
    if function.driver is None:
        yield Reason(
            Why.NO_DRIVER, "no driver", "load NVIDIA's, or bind the card to vfio-pci at boot"
        )
    elif function.driver == NVIDIA_DRIVER and facts.nvml.awaited:
        yield Reason(Why.NVML, "NVML has not answered yet")
    elif function.driver == NVIDIA_DRIVER and function.address in facts.nvml.silent:
        words = "".join(f" ({fault})" for fault in facts.nvml.unplaced)
        yield Reason(
            Why.NVML,
            f"NVIDIA's driver has it, but NVML does not know it{words}",
            f"see nvidia-smi -L, and dmesg | grep {function.address}",
        )


def _nvml(sighting: Sighting) -> Iterator[Reason]:
    seen = sighting.seen
    if seen is None:
        return
    if seen.mig_enabled:
        yield Reason(
            Why.SETTING, "MIG is on", f"nvidia-smi -i {seen.address} -mig 0, then reset the card"
        )
    if seen.ecc_pending:
        yield Reason(Why.SETTING, "an ECC mode change is pending", "reset the card")
    for trouble in seen.unhealthy:
        yield Reason(Why.UNHEALTHY, trouble)


def _named(function: PciFunction) -> str:
    return f"{pciclass.in_words(function.class_code)} {function.address}"
