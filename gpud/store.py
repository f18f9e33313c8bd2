"""The record of every order: one SQLite file, one thread that touches it, one door for changes.

Each public coroutine is one transaction (WAL, ``synchronous=FULL``: it is on disk when it returns).
The transaction runs whole on the store's own thread, so nothing can await in the middle of it and a
caller who goes away cannot interrupt it. Live instances are also kept in memory, replaced after each
commit, so that reading them costs no I/O.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

import structlog

from gpud import statefile
from gpud.cardrecord import CardRecord
from gpud.errors import Code, GpudError
from gpud.model import (
    FIRST_STEP,
    LEGAL_STATUS,
    LEGAL_STEPS,
    Grant,
    GuestInput,
    Instance,
    Order,
    PciAddress,
    Status,
    Step,
)
from gpud.schema import (
    INSERT,
    RESTORED,
    UPDATE,
    from_row,
    guest_input_from,
    guest_input_row,
    to_row,
)
from gpud.statefile import STATE_FILE, UNREADABLE, Claim, claim

T = TypeVar("T")
_log = structlog.get_logger()

_BY_EITHER_ID = (
    "SELECT * FROM instance WHERE upstream_id = ?1 OR instance_id = ?1"
    " ORDER BY upstream_id = ?1 DESC LIMIT 1"
)
_NEWEST = "SELECT * FROM instance ORDER BY created_at DESC LIMIT ?"
_RECENT_BOOTS = 20
_BY_CALLER = "the caller asked to terminate it"


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to an order.

    Attributes:
        instance: The instance, new or from before.
        replayed: True when the same order had been accepted earlier.
        usual_boot_s: How long recent instances of this shape took from order to running, if any did.
    """

    instance: Instance
    replayed: bool
    usual_boot_s: float | None


class Store(CardRecord):
    """See the module's docstring. Built by :meth:`open`."""

    def __init__(self, claim: Claim, clock: Callable[[], float]) -> None:
        super().__init__(claim.connection, clock)
        self._claim = claim
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._by_instance_id: dict[str, str] = {}
        self._changed: dict[str, Instance] = {}
        self._listeners: list[Callable[[Instance], None]] = []
        self.owner, self.restored, self.version = "", False, 0
        self._log_to_empty = False
        self.last_address: IPv4Address | None = None

    @classmethod
    async def open(cls, state_dir: Path, clock: Callable[[], float] = time.time) -> Self:
        """Open, or on the very first start create, the state file in ``state_dir``.

        Raises:
            GpudError: ``STATE_UNUSABLE`` when another gpud holds it, or the file is damaged, from a
                newer gpud, or missing although guests' disks are there.
        """
        return await cls.on(claim(state_dir), clock)

    @classmethod
    async def on(cls, claim: Claim, clock: Callable[[], float] = time.time) -> Self:
        """Read what lives, from a state directory that was claimed already, and now is the store's.

        Raises:
            GpudError: ``STATE_UNUSABLE``: the file holds what this gpud cannot read.
        """
        store = cls(claim, clock)
        try:
            await store._run(store._load)
        except UNREADABLE as error:
            await store.close()
            raise statefile.unusable(claim.state_dir / STATE_FILE, error) from error
        return store

    async def close(self) -> None:
        """Let the transaction under way end, then close the file."""
        await self._run(self._claim.close)
        self._thread.shutdown()

    # -- reading ---------------------------------------------------------------------------------

    @property
    def live(self) -> Mapping[str, Instance]:
        """Instances that may still hold something, by ``upstream_id``; as of the last commit."""
        return MappingProxyType(self._live)

    def find_live(self, either_id: str) -> Instance | None:
        """A live instance by ``upstream_id`` or the caller's ``instance_id``, without I/O."""
        instance = self._live.get(either_id)
        return instance or self._live.get(self._by_instance_id.get(either_id, ""))

    async def find(self, either_id: str) -> Instance | None:
        """Any instance, ended ones too, by ``upstream_id`` or the caller's ``instance_id``."""
        return self.find_live(either_id) or await self._run(lambda: self._find(either_id))

    async def guest_input(self, upstream_id: str) -> GuestInput:
        """What the guest is to be given; empty once the instance has ended."""
        query = "SELECT * FROM guest_input WHERE upstream_id = ?"
        row = await self._run(lambda: self._connection.execute(query, (upstream_id,)).fetchone())
        return guest_input_from(row) if row is not None else GuestInput()

    async def recent(self, limit: int) -> list[Instance]:
        """The newest instances, ended ones too, newest first."""
        rows = await self._run(lambda: self._connection.execute(_NEWEST, (limit,)).fetchall())
        return [from_row(row) for row in rows]

    # -- changing --------------------------------------------------------------------------------

    async def admit(self, order: Order, decide: Callable[[Sequence[Grant]], Grant]) -> Admission:
        """Accept an order, or find that it was accepted before: one transaction.

        Args:
            order: The validated order.
            decide: Given the grants of all live instances, returns the grant for this order or
                raises; it runs inside the transaction, so what it sees cannot change under it.

        Raises:
            GpudError: ``INSTANCE_ID_REUSED`` when the id stands for another order; ``NO_CAPACITY`` while
                the state is one from a backup, which may have forgotten this very order, and who has
                which address; whatever ``decide`` raises. Nothing was recorded then.
        """
        return await self._change(lambda: self._admit(order, decide))

    async def move(
        self,
        instance: Instance,
        step: Step,
        *,
        why: str = "",
        quarantine: Mapping[PciAddress, str] = MappingProxyType({}),
        **changes: Any,  # noqa: ANN401
    ) -> Instance:
        """Commit the next step, with whatever else changes beside it.

        A caller's status wins over one that would be a step back (a DELETE arrived meanwhile).

        Args:
            instance: As it was when the step began.
            step: The next step.
            why: For the event.
            quarantine: Cards that are to be quarantined too, with the reason of each.
            changes: Fields of the instance.

        Raises:
            ValueError: The move is not in the table of legal ones, or the instance has moved on
                since ``instance`` was read: a defect of the caller.
        """

        def work() -> Instance:
            self._quarantine_cards_of(instance, quarantine)
            return self._move(instance, step, why, changes)

        return await self._change(work)

    async def request_delete(self, either_id: str, why: str = _BY_CALLER) -> Instance | None:
        """Record that the caller, or the operator, wants it gone; None when there never was one."""
        return await self._change(lambda: self._request_delete(either_id, why))

    async def guest_booted(self, upstream_id: str, boot_id: str) -> None:
        """Count a boot in which the guest reported its startup script started; each boot once."""
        await self._change(lambda: self._guest_booted(upstream_id, boot_id))

    async def script_exited(self, upstream_id: str, exit_code: int) -> bool:
        """Record how the startup script first ended in this boot; False when that is known already."""
        return await self._change(lambda: self._script_exited(upstream_id, exit_code))

    async def trust(self) -> None:
        """Take a restored state for the whole truth again: what it does not know is an orphan."""
        await self._change(self._trust)
        self.restored = False
        self.version += 1

    def subscribe(self, listener: Callable[[Instance], None]) -> None:
        """Call ``listener`` on the event loop after each commit, with the instance that changed."""
        self._listeners.append(listener)

    # -- on the store's thread -------------------------------------------------------------------

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _change(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        return await self._run(lambda: self._transaction(work, loop))

    def _transaction(self, work: Callable[[], T], loop: asyncio.AbstractEventLoop) -> T:
        self._changed = {}
        self._cards_changed = False
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            result = work()
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:  # SQLite itself ends it on a full disk, say
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                self._log_to_empty = True  # of frames that do not count
                raise statefile.not_written(error) from error
            raise
        self._publish(loop)
        if self._log_to_empty:
            self._empty_log()
        return result

    def _publish(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._cards_changed:
            self._load_cards()
        elif not self._changed:
            return
        self.version += 1
        live = {**self._live, **self._changed}
        self._live = {key: instance for key, instance in live.items() if instance.live}
        self._by_instance_id = {one.instance_id: one.upstream_id for one in self._live.values()}
        loop.call_soon_threadsafe(self._tell, loop, tuple(self._changed.values()))
        # Scripts and keys of who has ended are gone from the tables, and not yet from the log.
        self._log_to_empty |= not all(instance.live for instance in self._changed.values())

    def _tell(self, loop: asyncio.AbstractEventLoop, changed: Sequence[Instance]) -> None:
        for instance in changed:
            for listener in self._listeners:
                loop.call_soon(listener, instance)  # so that none takes the news from the others

    def _empty_log(self) -> None:
        self._log_to_empty = False
        if why := statefile.empty_log(self._connection):
            _log.warning("state log not emptied; the next end of an instance does it", why=why)

    def _load(self) -> None:
        self._empty_log()  # a crash may have come between the end of an instance and this
        query = "SELECT * FROM instance WHERE step != 'ended'"
        live = [from_row(row) for row in self._connection.execute(query)]
        self._live = {instance.upstream_id: instance for instance in live}
        self._by_instance_id = {one.instance_id: one.upstream_id for one in live}
        self._load_cards()
        new_owner = "INSERT OR IGNORE INTO meta VALUES ('owner', ?)"
        self._connection.execute(new_owner, (secrets.token_hex(8),))
        meta = dict(self._connection.execute("SELECT key, value FROM meta"))
        self.owner, self.restored = meta["owner"], RESTORED in meta
        for newest in self._connection.execute(_NEWEST, (1,)):
            self.last_address = from_row(newest).grant.address

    def _trust(self) -> None:
        self._connection.execute("DELETE FROM meta WHERE key = ?", (RESTORED,))
        self._note("", "restored", "trusted", "what the restored state does not know may go")

    def _find(self, either_id: str) -> Instance | None:
        row = self._connection.execute(_BY_EITHER_ID, (either_id,)).fetchone()
        return from_row(row) if row is not None else None

    def _admit(self, order: Order, decide: Callable[[Sequence[Grant]], Grant]) -> Admission:
        query = "SELECT * FROM instance WHERE instance_id = ?"
        row = self._connection.execute(query, (order.instance_id,)).fetchone()
        if row is not None:
            known = from_row(row)
            if known.fingerprint != order.fingerprint:
                raise GpudError(
                    Code.INSTANCE_ID_REUSED,
                    "this instance_id was used before for a different order",
                )
            return Admission(known, replayed=True, usual_boot_s=self._usual_boot_s(known.grant))
        if self.restored:
            raise GpudError(
                Code.NO_CAPACITY,
                "this server's record is from a backup; it sells again when its operator has checked it",
            )
        grant = decide([instance.grant for instance in self._live.values()])
        now = self._clock()
        instance = Instance(
            upstream_id=f"i-{secrets.token_hex(8)}",
            instance_id=order.instance_id,
            fingerprint=order.fingerprint,
            tier=order.tier,
            grant=grant,
            status=Status.CREATING,
            step=FIRST_STEP,
            step_since=now,
            created_at=now,
        )
        self._connection.execute(INSERT, to_row(instance))
        given = guest_input_row(instance.upstream_id, order.guest_input)
        self._connection.execute("INSERT INTO guest_input VALUES (?, ?, ?, ?)", given)
        claims = [(str(gpu.address), instance.upstream_id) for gpu in grant.gpus]
        self._connection.executemany("INSERT INTO gpu_claim VALUES (?, ?)", claims)
        if grant.address is not None:
            claim = (str(grant.address), instance.upstream_id)
            self._connection.execute("INSERT INTO address_claim VALUES (?, ?)", claim)
            self.last_address = grant.address
        self._note(instance.upstream_id, "", _place(instance), "order accepted")
        self._changed[instance.upstream_id] = instance
        return Admission(instance, replayed=False, usual_boot_s=self._usual_boot_s(grant))

    def _usual_boot_s(self, grant: Grant) -> float | None:
        """Upper quartile of the recent boots of this shape."""
        query = (
            "SELECT running_at - created_at FROM instance WHERE gpu_type = ? AND gpu_count = ?"
            " AND running_at IS NOT NULL ORDER BY running_at DESC LIMIT ?"
        )
        shape = (grant.shape.gpu_type, grant.shape.gpu_count, _RECENT_BOOTS)
        boots = sorted(row[0] for row in self._connection.execute(query, shape))
        return boots[len(boots) * 3 // 4] if boots else None

    def _move(self, read: Instance, step: Step, why: str, changes: dict[str, Any]) -> Instance:
        current = self._live.get(read.upstream_id)
        if current is None or current.step is not read.step:
            raise ValueError(f"{read.upstream_id} is no longer at {read.step}")
        if step not in LEGAL_STEPS[current.step]:
            raise ValueError(f"{read.upstream_id} cannot go from {current.step} to {step}")
        now = self._clock()
        changes = {**changes, "step": step, "step_since": now}
        if changes.get("status") not in LEGAL_STATUS[current.status]:
            changes.pop("status", None)
        if step is Step.ENDED:
            changes["status"] = (
                Status.ERROR if current.status is Status.ERROR else Status.TERMINATED
            )
            changes["ended_at"] = now
            for table in ("guest_input", "gpu_claim", "address_claim"):
                query = f"DELETE FROM {table} WHERE upstream_id = ?"  # noqa: S608 - names from above
                self._connection.execute(query, (read.upstream_id,))
        return self._put(current, changes, why)

    def _request_delete(self, either_id: str, why: str) -> Instance | None:
        found = self._find(either_id)
        if found is None or found.delete_requested_at is not None:
            return found
        status = Status.STOPPING if found.live else Status.TERMINATED
        changes: dict[str, Any] = {"delete_requested_at": self._clock()}
        if status in LEGAL_STATUS[found.status]:
            changes["status"] = status
        return self._put(found, changes, why)

    def _guest_booted(self, upstream_id: str, boot_id: str) -> None:
        current = self._live.get(upstream_id)
        if current is not None and current.boot_id != boot_id:
            changes = {"boot_id": boot_id, "guest_boots": current.guest_boots + 1}
            why = "the guest reported its startup script started"
            self._put(current, {**changes, "script_exit_code": None}, why)

    def _script_exited(self, upstream_id: str, exit_code: int) -> bool:
        current = self._live.get(upstream_id)
        if current is None or current.script_exit_code is not None:
            return False  # a guest could go on telling another one, and each is a write to the disk
        why = f"the startup script ended with exit code {exit_code}"
        self._put(current, {"script_exit_code": exit_code}, why)
        return True

    def _put(self, current: Instance, changes: dict[str, Any], why: str) -> Instance:
        """The one place that changes an instance."""
        instance = replace(current, **changes)
        self._connection.execute(UPDATE, to_row(instance))
        self._note(instance.upstream_id, _place(current), _place(instance), why)
        self._changed[instance.upstream_id] = instance
        return instance


def _place(instance: Instance) -> str:
    return f"{instance.status.value}/{instance.step.value}"
