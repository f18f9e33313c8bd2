"""Reads what the record says of cards, from a file that the daemon may be writing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from gpud.drains import drain_from
from gpud.inventory.facts import Claim, Record
from gpud.model import RELEASE_STEPS
from gpud.schema import from_row, known_card_from, quarantine_from
from gpud.statefile import STATE_FILE, connect_to_read, examine, unusable


def read_record(state_dir: Path) -> Record:
    """Read it, having seen that it is sound.

    Raises:
        GpudError: ``STATE_UNUSABLE``.
    """
    path = state_dir / STATE_FILE
    try:
        if (fault := examine(path)) is not None:
            raise unusable(path, fault)
    except sqlite3.Error as error:
        raise unusable(path, error) from error
    with closing(connect_to_read(state_dir)) as connection:
        try:
            rows = connection.execute
            live = [from_row(row) for row in rows("SELECT * FROM instance WHERE step != 'ended'")]
            known = map(known_card_from, rows("SELECT * FROM known_card"))
            quarantines = map(quarantine_from, rows("SELECT * FROM quarantine"))
            drains = map(drain_from, rows("SELECT * FROM drain"))
            return Record(
                known={one.address: one for one in known},
                quarantines={one.address: one for one in quarantines},
                claims={
                    gpu.address: Claim(instance.upstream_id, instance.step in RELEASE_STEPS)
                    for instance in live
                    for gpu in instance.grant.gpus
                },
                drains={one.address: one for one in drains},
            )
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise unusable(path, f"it holds what this gpud cannot read: {error}") from error
