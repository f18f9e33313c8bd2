"""Holds the record against what is really there, and removes what belongs to no live instance.

Only gpud's own things are looked at: domains that carry this state's owner mark, and files in its own
directories. Every check looks at the record again right before it acts, so an order that arrives
meanwhile is never taken for an orphan.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from gpud.config import Config
from gpud.errors import GpudError
from gpud.guest import disk
from gpud.guest.console import ConsoleLogs
from gpud.guest.disk import InstanceFiles
from gpud.hypervisor.domainxml import Identity
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.lifecycle.steps import lease_holder, network_spec
from gpud.lifecycle.strays import StrayWatch
from gpud.model import UPSTREAM_ID, Status
from gpud.store import Store
from gpud.telemetry import Metrics

_log = structlog.get_logger()

_EVERY_S = 300.0
_CONSOLES_OF_FAILED = 20


class Reconciler:
    """Finds orphans at start and every few minutes."""

    def __init__(
        self,
        config: Config,
        store: Store,
        hypervisor: Hypervisor,
        consoles: ConsoleLogs,
        metrics: Metrics,
        strays: StrayWatch,
    ) -> None:
        self._config = config
        self._store = store
        self._hypervisor = hypervisor
        self._consoles = consoles
        self._metrics = metrics
        self._strays = strays
        self._turn = asyncio.Lock()
        self._told: dict[tuple[str, str], str] = {}
        self._only_shown = False

    async def run(self) -> None:
        """Reconcile for as long as the daemon lives."""
        while True:
            await self._hypervisor.wait_available()
            try:
                await self.once()
            except (GpudError, OSError) as error:
                _log.warning("reconcile failed; it is tried again", error=str(error))
            except Exception:  # noqa: BLE001 - a defect here must not end the daemon
                _log.exception("reconcile failed unexpectedly; it is tried again")
            await asyncio.sleep(_EVERY_S)

    async def once(self, *, repair: bool = False) -> None:
        """Look at everything once.

        What cannot be removed is logged, holds up nothing else, and is tried again the next time. While
        the state is one from a backup, orphans are only shown: they may be guests that were ordered
        after it was made.

        Args:
            repair: The operator wants orphans removed, of such a state too, from now on.

        Raises:
            GpudError: libvirt could not be asked.
        """
        async with self._turn:  # the operator may ask for a look while one is under way
            self._only_shown = self._store.restored and not repair
            still_running = await self._domains()
            await self._files(still_running)
            await self._console_logs()
            await self._leases(still_running)
            await self._strays.look()
            if self._store.restored and repair:
                await self._store.trust()

    async def _domains(self) -> set[str]:
        """End orphan domains; returns those that cannot be ended, whose files and leases stay too."""
        still_running: set[str] = set()
        for domain in await self._hypervisor.domains():
            if domain.identity is None or not self._is_orphan(domain.identity):
                continue
            upstream_id = domain.identity.upstream_id
            end = partial(self._hypervisor.stop, domain.uuid)
            gone = await self._remove("domain", domain.name, upstream_id, end)
            still_running |= set() if gone else {upstream_id}
        return still_running

    def _is_orphan(self, identity: Identity) -> bool:
        return identity.owner == self._store.owner and identity.upstream_id not in self._store.live

    async def _leases(self, still_running: set[str]) -> None:
        network = self._config.network
        if network.mode != "network":
            return
        await self._hypervisor.ensure_network(network_spec(self._config))
        for lease in await self._hypervisor.leases(network.name):
            holder = lease_holder(lease, self._store.owner)
            if holder is not None and holder not in {*self._store.live, *still_running}:
                removal = partial(self._hypervisor.remove_lease, network.name, lease.mac)
                await self._remove("lease", lease.name, holder, removal)

    async def _files(self, still_running: set[str]) -> None:
        directory = self._config.state_dir / "instances"
        names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
        for name in names:
            if UPSTREAM_ID.fullmatch(name) and name not in {*self._store.live, *still_running}:
                removal = partial(disk.remove, InstanceFiles.of(self._config.state_dir, name))
                await self._remove("directory", name, name, removal)

    async def _console_logs(self) -> None:
        """Keep the consoles of live instances, and of the newest that failed and were not deleted."""
        kept = self._consoles.kept()
        if kept <= set(self._store.live) or self._only_shown:
            return
        failed = [one.upstream_id for one in await self._store.recent(1000)
                  if one.status is Status.ERROR][:_CONSOLES_OF_FAILED]  # fmt: skip
        for upstream_id in kept - set(failed):
            if upstream_id not in self._store.live:
                self._consoles.remove(upstream_id)

    async def _remove(
        self, kind: str, name: str, upstream_id: str, removal: Callable[[], Awaitable[None]]
    ) -> bool:
        if self._only_shown:
            _log.warning("orphan left alone: the state is from a backup; `gpud check --repair`"
                         " removes it", kind=kind, name=name)  # fmt: skip
            why = f"{kind} {name} has no instance; left alone, since the state is from a backup"
            await self._tell(kind, name, upstream_id, "left alone", why)
            return False
        try:
            await removal()
        except GpudError as error:
            _log.error("orphan cannot be removed", kind=kind, name=name, error=str(error))
            why = f"{kind} {name} has no instance and cannot be removed: {error.detail}"
            await self._tell(kind, name, upstream_id, "not removed", why)
            return False
        _log.warning("orphan removed", kind=kind, name=name)
        self._metrics.orphans.labels(kind).inc()
        await self._tell(kind, name, upstream_id, "removed", f"{kind} {name} had no instance")
        del self._told[kind, name]
        return True

    async def _tell(self, kind: str, name: str, upstream_id: str, became: str, why: str) -> None:
        """Make an event of what is new, not of what is found again every few minutes."""
        if self._told.get((kind, name)) == became:
            return
        self._told[kind, name] = became
        await self._store.note(why, upstream_id=upstream_id, was="orphan", became=became)
