"""The tables of the state file, how they came to be, and how a row becomes an :class:`Instance`.

Migrations are applied in order and never edited once released; SQLite's ``user_version`` counts them.
"""

from __future__ import annotations

import json
import sqlite3
from decimal import Decimal
from ipaddress import IPv4Address
from typing import Any, Final

from gpud.model import Gpu, Grant, GuestInput, Instance, PciAddress, Shape, Status, Step, Tier

MIGRATIONS: Final = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;

    CREATE TABLE instance (
        upstream_id         TEXT PRIMARY KEY,
        instance_id         TEXT NOT NULL UNIQUE,
        fingerprint         TEXT NOT NULL,
        tier                TEXT NOT NULL,
        gpu_type            TEXT NOT NULL,
        gpu_count           INTEGER NOT NULL,
        cpu_cores           INTEGER NOT NULL,
        memory_mib          INTEGER NOT NULL,
        storage_gib         INTEGER NOT NULL,
        gpus                TEXT NOT NULL,
        address             TEXT,
        image_digest        TEXT NOT NULL,
        cost_per_hour       TEXT NOT NULL,
        region              TEXT NOT NULL,
        datacenter_location TEXT NOT NULL,
        status              TEXT NOT NULL,
        step                TEXT NOT NULL,
        step_since          REAL NOT NULL,
        created_at          REAL NOT NULL,
        running_at          REAL,
        ended_at            REAL,
        delete_requested_at REAL,
        failure             TEXT,
        boot_id             TEXT,
        guest_boots         INTEGER NOT NULL,
        boots_at_start      INTEGER NOT NULL,
        script_exit_code    INTEGER,
        restarts            INTEGER NOT NULL,
        last_start_at       REAL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX instance_live ON instance (step) WHERE step != 'ended';
    CREATE INDEX instance_boots ON instance (gpu_type, gpu_count, running_at)
        WHERE running_at IS NOT NULL;

    -- What a guest is to be given. Holds secrets: deleted, and overwritten, when the instance ends.
    CREATE TABLE guest_input (
        upstream_id     TEXT PRIMARY KEY REFERENCES instance,
        ssh_public_keys TEXT NOT NULL,
        docker_image    TEXT,
        startup_script  BLOB
    ) STRICT, WITHOUT ROWID;

    -- The primary keys are what makes selling a GPU or an address twice impossible.
    CREATE TABLE gpu_claim (
        gpu         TEXT PRIMARY KEY,
        upstream_id TEXT NOT NULL REFERENCES instance
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE address_claim (
        address     TEXT PRIMARY KEY,
        upstream_id TEXT NOT NULL REFERENCES instance
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE event (
        id          INTEGER PRIMARY KEY,
        at          REAL NOT NULL,
        upstream_id TEXT NOT NULL,
        was         TEXT NOT NULL,
        became      TEXT NOT NULL,
        why         TEXT NOT NULL
    ) STRICT;
    CREATE INDEX event_instance ON event (upstream_id, id);
    """,
)

COLUMNS: Final = (
    "upstream_id", "instance_id", "fingerprint", "tier", "gpu_type", "gpu_count", "cpu_cores",
    "memory_mib", "storage_gib", "gpus", "address", "image_digest", "cost_per_hour", "region",
    "datacenter_location", "status", "step", "step_since", "created_at", "running_at", "ended_at",
    "delete_requested_at", "failure", "boot_id", "guest_boots", "boots_at_start",
    "script_exit_code", "restarts", "last_start_at",
)  # fmt: skip

_PLAIN: Final = COLUMNS[COLUMNS.index("step_since") :]


def migrate(connection: sqlite3.Connection) -> int:
    """Bring the tables up to date; each migration is one transaction.

    Returns:
        The version the file had before; more than ``len(MIGRATIONS)`` means it is from a newer gpud,
        and nothing was touched.
    """
    before: int = connection.execute("PRAGMA user_version").fetchone()[0]
    for number, script in enumerate(MIGRATIONS[before:], start=before + 1):
        connection.executescript(
            f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;"
        )
    return before


def to_row(instance: Instance) -> dict[str, Any]:
    """The columns of an instance."""
    grant, shape = instance.grant, instance.grant.shape
    return {
        "upstream_id": instance.upstream_id,
        "instance_id": instance.instance_id,
        "fingerprint": instance.fingerprint,
        "tier": instance.tier.value,
        "gpu_type": shape.gpu_type,
        "gpu_count": shape.gpu_count,
        "cpu_cores": shape.cpu_cores,
        "memory_mib": shape.memory_mib,
        "storage_gib": shape.storage_gib,
        "gpus": json.dumps([[str(gpu.address), gpu.stand_in] for gpu in grant.gpus]),
        "address": str(grant.address) if grant.address else None,
        "image_digest": grant.image_digest,
        "cost_per_hour": str(grant.cost_per_hour),
        "region": grant.region,
        "datacenter_location": grant.datacenter_location,
        "status": instance.status.value,
        "step": instance.step.value,
        **{name: getattr(instance, name) for name in _PLAIN},
    }


def from_row(row: sqlite3.Row) -> Instance:
    """The instance of a row."""
    shape = Shape(
        gpu_type=row["gpu_type"],
        gpu_count=row["gpu_count"],
        cpu_cores=row["cpu_cores"],
        memory_mib=row["memory_mib"],
        storage_gib=row["storage_gib"],
    )
    gpus = tuple(
        Gpu(PciAddress.parse(address), shape.gpu_type, stand_in)
        for address, stand_in in json.loads(row["gpus"])
    )
    return Instance(
        upstream_id=row["upstream_id"],
        instance_id=row["instance_id"],
        fingerprint=row["fingerprint"],
        tier=Tier(row["tier"]),
        grant=Grant(
            shape=shape,
            gpus=gpus,
            address=IPv4Address(row["address"]) if row["address"] else None,
            image_digest=row["image_digest"],
            cost_per_hour=Decimal(row["cost_per_hour"]),
            region=row["region"],
            datacenter_location=row["datacenter_location"],
        ),
        status=Status(row["status"]),
        step=Step(row["step"]),
        **{name: row[name] for name in _PLAIN},
    )


def guest_input_row(
    upstream_id: str, given: GuestInput
) -> tuple[str, str, str | None, bytes | None]:
    """The ``guest_input`` row of an order."""
    keys = json.dumps(given.ssh_public_keys)
    return upstream_id, keys, given.docker_image, given.startup_script


def guest_input_from(row: sqlite3.Row) -> GuestInput:
    """What the guest of a ``guest_input`` row is to be given."""
    keys = tuple(json.loads(row["ssh_public_keys"]))
    return GuestInput(keys, row["docker_image"], row["startup_script"])
