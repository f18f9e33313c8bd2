"""Reads the record for the audit, from a file that the daemon may be writing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from gpud.audit.facts import Record
from gpud.drains import drain_from
from gpud.lifecycle.strays import noted_drivers
from gpud.model import Status, Step
from gpud.schema import from_row, quarantine_from


def read_record(connection: sqlite3.Connection, boot_id: str) -> Record:
    """Read all of it in one transaction, as of its beginning.

    Args:
        connection: The state file, open for reading.
        boot_id: Of the server's present boot.

    Raises:
        sqlite3.Error, ValueError: It cannot be read.
    """
    rows = connection.execute
    rows("BEGIN")
    try:
        live = [from_row(row) for row in rows("SELECT * FROM instance WHERE step != 'ended'")]
        noting = rows(
            "SELECT * FROM instance WHERE drivers_noted_in = ? ORDER BY created_at", (boot_id,)
        )
        failed = rows(
            "SELECT upstream_id FROM instance WHERE step = ? AND status = ?",
            (Step.ENDED.value, Status.ERROR.value),
        )
        quarantines = map(quarantine_from, rows("SELECT * FROM quarantine"))
        drains = map(drain_from, rows("SELECT * FROM drain"))
        return Record(
            owner=rows("SELECT value FROM meta WHERE key = 'owner'").fetchone()[0],
            live={instance.upstream_id: instance for instance in live},
            failed=_ids(failed),
            gpu_claims=dict(map(tuple, rows("SELECT gpu, upstream_id FROM gpu_claim"))),
            address_claims=dict(map(tuple, rows("SELECT address, upstream_id FROM address_claim"))),
            guest_inputs=_ids(rows("SELECT upstream_id FROM guest_input")),
            quarantines={one.address: one for one in quarantines},
            drains={one.address: one for one in drains},
            noted=noted_drivers(map(from_row, noting), boot_id),
        )
    finally:
        rows("ROLLBACK")


def _ids(rows: Iterable[sqlite3.Row]) -> frozenset[str]:
    return frozenset(row["upstream_id"] for row in rows)
