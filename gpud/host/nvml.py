"""What NVML tells of the NVIDIA GPUs whose driver is loaded: identity, health, who uses them.

NVML runs in a child process (:mod:`gpud.host.nvmlprobe`), so a library that hangs, crashes or is not
there costs a sentence in the report. Nothing here raises for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from gpud import command
from gpud.errors import GpudError
from gpud.model import PciAddress

_log = structlog.get_logger()

_PROBE: Final = Path(__file__).with_name("nvmlprobe.py")
_START_S: Final = 10.0
"""Beyond NVML's own time: for Python to start, and to reap what was killed."""
_GONE_S: Final = 5.0
_GONE_POLL_S: Final = 0.01
_MOST_STUCK: Final = 16
"""Readers that cannot be killed before NVML is left alone: each new probe would leave more."""


@dataclass(frozen=True, slots=True)
class HolderProcess:
    """A process that uses a GPU."""

    pid: int
    name: str


@dataclass(frozen=True, slots=True)
class NvmlGpu:
    """One card as NVML knows it. None is "not told": the card has no such thing, or did not answer.

    Attributes:
        serial: Of the board; consumer cards have none.
        pci_ids: ``vendor:device`` in hex: ``10de:2330``; likewise ``subsystem_ids``.
        minor: The N of ``/dev/nvidiaN``.
        mig_enabled: MIG is on, or will be after the next reset.
        ecc_pending: ECC will be switched on or off by the next reset.
        ecc_uncorrected: Memory errors since the driver was loaded or the card was reset.
        ecc_uncorrected_lifetime: The same over the card's life.
        retired_pages: Memory pages given up for good, on cards before Ampere.
        retirement_pending: More will be at the next reset.
        remap_pending: Memory rows will be replaced by spare ones at the next reset, Ampere and later.
        remap_failed: There was no spare row left.
        nvlink_peers: GPUs at the other end of its NVLinks.
        nvswitch: Its NVLinks go to NVSwitches.
        persistence: The driver keeps the card initialised when nobody uses it.
        inforom: Version of the infoROM image.
        fault: Why the card's answers cannot be relied on, in plain words.
    """

    address: PciAddress
    name: str | None = None
    uuid: str | None = None
    serial: str | None = None
    vram_mib: int | None = None
    pci_ids: str | None = None
    subsystem_ids: str | None = None
    minor: int | None = None
    mig_enabled: bool = False
    ecc_pending: bool = False
    ecc_uncorrected: int | None = None
    ecc_uncorrected_lifetime: int | None = None
    retired_pages: int | None = None
    retirement_pending: bool = False
    remap_pending: bool = False
    remap_failed: bool = False
    memory_used_mib: int | None = None
    processes: tuple[HolderProcess, ...] = ()
    nvlink_peers: tuple[PciAddress, ...] = ()
    nvswitch: bool = False
    persistence: bool | None = None
    temperature_c: int | None = None
    power_w: int | None = None
    vbios: str | None = None
    inforom: str | None = None
    fault: str | None = None

    @property
    def unhealthy(self) -> tuple[str, ...]:
        """What is wrong with the card itself, in plain words; its settings (MIG, ECC) are no illness."""
        errors = self.ecc_uncorrected or 0
        reasons = {
            self.fault or "": self.fault is not None,
            f"{errors} uncorrected memory error{'s' * (errors > 1)}": errors > 0,
            "memory pages wait to be retired: reset it": self.retirement_pending,
            "memory rows wait to be remapped: reset it": self.remap_pending,
            "a memory row could not be remapped: replace the card": self.remap_failed,
        }
        return tuple(words for words, so in reasons.items() if so)


@dataclass(frozen=True, slots=True)
class NvmlReport:
    """What NVML said of all cards that have NVIDIA's driver.

    Attributes:
        gpus: By address.
        problem: Why NVML says nothing at all, in plain words.
        unplaced: Faults of cards whose address could not be learned.
    """

    gpus: tuple[NvmlGpu, ...] = ()
    driver_version: str | None = None
    problem: str | None = None
    unplaced: tuple[str, ...] = ()


class Nvml:
    """Asks NVML, unless its handles must be closed.

    Args:
        timeout_s: Seconds that NVML has for the host's own answers, and again for those of all cards.
        env: Variables for the child, where the library is not in its usual place.
        proc: Where procfs is.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        timeout_s: float = 20,
        env: Mapping[str, str] | None = None,
        proc: Path = Path("/proc"),
    ) -> None:
        self._timeout_s = timeout_s
        self._env = dict(env or {})
        self._proc = proc
        # Of this daemon and no other; Linux cuts a process's name at 15 characters.
        self._comm = f"nvml{os.getpid()}.{next(self._numbers)}"[:15]
        self._turn = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()
        self._closers = 0
        self._probe: asyncio.Task[NvmlReport] | None = None

    async def report(self) -> NvmlReport:
        """Ask NVML about every card, now. Never raises for what NVML does.

        Waits while :meth:`closed` is in force, so do not call it inside; a probe that was killed for
        that is made anew.
        """
        async with self._turn:
            while True:
                while not self._open.is_set():  # it may be closed again before this task runs
                    await self._open.wait()
                probe = self._probe = asyncio.create_task(self._ask())
                try:
                    await asyncio.wait([probe])
                except asyncio.CancelledError:
                    probe.cancel()
                    await asyncio.wait([probe])
                    raise
                if not probe.cancelled():
                    return probe.result()

    @contextlib.asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Keep NVML out: inside, no probe runs or starts, so none of our handles holds a GPU.

        Any number of tasks may be inside at once; NVML comes back when the last has left.
        """
        self._closers += 1
        self._open.clear()
        try:
            if self._probe is not None:
                self._probe.cancel()
                await asyncio.wait([self._probe])
            await self._readers_gone()
            yield
        finally:
            self._closers -= 1
            if not self._closers:
                self._open.set()

    async def _ask(self) -> NvmlReport:
        stuck = await asyncio.to_thread(self._readers)
        if len(stuck) >= _MOST_STUCK:
            return NvmlReport(problem=f"{len(stuck)} probes are stuck in the driver: reboot")
        try:
            done = await command.run(
                sys.executable,
                "-I",  # neither the environment nor the working directory decides what is imported
                _PROBE,
                str(self._timeout_s),
                self._comm,
                timeout_s=2 * self._timeout_s + _START_S,
                env=self._env,
            )
            return _report(json.loads(done.stdout), self._driven_addresses())
        except GpudError as error:
            return NvmlReport(problem=f"NVML could not be asked: {error.detail}")
        except (ValueError, TypeError, KeyError, AttributeError):
            return NvmlReport(problem="NVML's answers are garbage")

    async def _readers_gone(self) -> None:
        """Wait until the kernel has closed what killed readers had open."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GONE_S):
                while await asyncio.to_thread(self._readers):  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(_GONE_POLL_S)
                return
        _log.warning("nvml readers are stuck in the driver", pids=self._readers())

    def _readers(self) -> list[int]:
        """Processes of our probes that are alive, the killed ones included."""
        found = []
        for stat in self._proc.glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # ended meanwhile
                pid, _, rest = stat.read_text(errors="replace").partition(" (")
                name, _, fields = rest.rpartition(") ")
                if name == self._comm and fields[0] not in "ZX":
                    found.append(int(pid))
        return found

    def _driven_addresses(self) -> set[PciAddress]:
        """GPUs that NVIDIA's driver has, as the driver itself lists them."""
        return {
            PciAddress.parse(card.name) for card in self._proc.glob("driver/nvidia/gpus/*:*:*.*")
        }


def _report(answers: dict[str, Any], driven: set[PciAddress]) -> NvmlReport:
    cards = answers["cards"]
    gpus = [_gpu(card) for card in cards if card.get("address")]
    faults = [
        f"card {index}: {card.get('fault')}"
        for index, card in enumerate(cards)
        if not card.get("address")
    ]
    missing = driven - {gpu.address for gpu in gpus}
    if faults and len(missing) == len(faults):
        # NVML numbers cards, the driver names addresses; these are the same cards, in whatever order.
        words = " or ".join(sorted({fault.partition(": ")[2] for fault in faults}))
        gpus += [NvmlGpu(address, fault=words) for address in missing]
        faults = []
    return NvmlReport(
        gpus=tuple(sorted(gpus, key=lambda gpu: gpu.address)),
        driver_version=answers["driver_version"],
        problem=answers["problem"],
        unplaced=tuple(faults),
    )


def _gpu(card: dict[str, Any]) -> NvmlGpu:
    memory, used, power = (
        card.get(fact) for fact in ("memory_bytes", "memory_used_bytes", "power_mw")
    )
    ecc, rows, persistence = card.get("ecc"), card.get("remapped_rows"), card.get("persistence")
    as_told = (
        *("name", "uuid", "serial", "pci_ids", "subsystem_ids", "minor"),
        *("ecc_uncorrected", "ecc_uncorrected_lifetime", "retired_pages"),
        *("temperature_c", "vbios", "inforom", "fault"),
    )
    return NvmlGpu(
        address=PciAddress.parse(card["address"]),
        vram_mib=None if memory is None else memory // 2**20,
        memory_used_mib=None if used is None else used // 2**20,
        mig_enabled=any(card.get("mig") or ()),
        ecc_pending=ecc is not None and ecc[0] != ecc[1],
        retirement_pending=bool(card.get("retirement_pending")),
        remap_pending=rows is not None and bool(rows[2]),
        remap_failed=rows is not None and bool(rows[3]),
        processes=tuple(HolderProcess(**each) for each in card.get("processes", ())),
        nvlink_peers=tuple(PciAddress.parse(peer) for peer in card.get("nvlink_peers", ())),
        nvswitch=card.get("nvswitch", False),
        persistence=None if persistence is None else bool(persistence),
        power_w=None if power is None else power // 1000,
        **{fact: card.get(fact) for fact in as_told},
    )
