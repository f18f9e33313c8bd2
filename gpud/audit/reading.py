"""Collects the facts of a server. Reads only."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from gpud.audit.facts import Facts, Record, Told, ToldCard
from gpud.audit.record import read_record
from gpud.config import Config
from gpud.errors import Code, GpudError
from gpud.guest.console import ConsoleLogs
from gpud.host.capacity import Capacity
from gpud.host.sysfs import Sysfs
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.hypervisor.networkxml import Lease
from gpud.lifecycle.cards import held_functions
from gpud.lifecycle.strays import OVERRIDE_S, candidates
from gpud.model import UPSTREAM_ID
from gpud.statefile import connect_to_read

Row = Mapping[str, Any]


class Reader:
    """Looks at a server.

    Args:
        config: Of the daemon.
        hypervisor: Connected to libvirt.
        sysfs: The tree.
        measure: Reads the host's capacity.
        boot_id: Of the server's present boot.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        config: Config,
        hypervisor: Hypervisor,
        sysfs: Sysfs,
        measure: Callable[[], Capacity],
        boot_id: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._hypervisor = hypervisor
        self._sysfs = sysfs
        self._measure = measure
        self._boot_id = boot_id
        self._clock = clock

    async def read(self, told: Told | None) -> Facts:
        """Look once. The record comes first: what is made after it belongs to nobody it knows of.

        Raises:
            GpudError: Something cannot be looked at.
        """
        record = await asyncio.to_thread(self._record)
        passed = await self._hypervisor.passed_functions()
        held = held_functions(record.live.values())
        idle = candidates(record.noted, held | passed.keys(), record.quarantines.values())
        consoles = ConsoleLogs(self._config.state_dir / "console", 0)
        with _readable():
            return Facts(
                config=self._config,
                now=self._clock(),
                record=record,
                capacity=await asyncio.to_thread(self._measure),
                domains=tuple(await self._hypervisor.domains()),
                passed=passed,
                directories=_directories(self._config.state_dir / "instances"),
                consoles=frozenset(consoles.kept()),
                leases=await self._leases(),
                drivers={one: self._sysfs.driver(one) for one in (*held, *idle)},
                overrides=await self._sysfs.overrides(idle, OVERRIDE_S),
                told=told,
            )

    def _record(self) -> Record:
        with closing(connect_to_read(self._config.state_dir)) as connection:
            try:
                return read_record(connection, self._boot_id)
            except (sqlite3.Error, ValueError, TypeError) as error:
                raise GpudError(
                    Code.STATE_UNUSABLE,
                    f"the state file in {self._config.state_dir} cannot be read: {error}",
                ) from error

    async def _leases(self) -> tuple[Lease, ...]:
        network = self._config.network
        if network.mode != "network":
            return ()
        return tuple(await self._hypervisor.leases(network.name))


def told(instances: Sequence[Row], gpus: Sequence[Row], since: float) -> Told:
    """What the daemon says, from its answers to ``/instances`` and ``/gpus``.

    Args:
        instances: The first answer's rows.
        gpus: The second's.
        since: When the daemon came up, in seconds since the epoch.
    """
    return Told(
        since,
        {row["upstream_id"]: f"{row['status']}/{row['step']}" for row in instances},
        tuple(ToldCard(row["address"], row["state"], tuple(row["why_not"])) for row in gpus),
    )


def _directories(parent: Path) -> dict[str, frozenset[str]]:
    """What is in each directory that bears an instance's name."""
    if not parent.is_dir():
        return {}
    found = (entry for entry in parent.iterdir() if UPSTREAM_ID.fullmatch(entry.name))
    return {entry.name: names for entry in found if (names := _names(entry)) is not None}


def _names(directory: Path) -> frozenset[str] | None:
    try:
        return frozenset(entry.name for entry in directory.iterdir())
    except FileNotFoundError:  # its instance ended meanwhile
        return None
    except NotADirectoryError:
        return frozenset()


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"this server cannot be looked at: {error}",
            hint="ask as root, or as the daemon's user",
        ) from error
