"""The tables of the state file, how they came to be, and how a row becomes an :class:`Instance`.

The upgrade path: migrations are applied in order, each in one transaction with its number in SQLite's
``user_version``, whenever a gpud opens a file of an older one. They are never edited, only added to;
``tests/data/state-1.sql`` is a file of the first gpud, which every later one must carry on. There is no
way down: an older gpud refuses a newer file, and what it can use is a backup from before the upgrade.

Instances are kept for ever, since they make a repeated order the same instance. Each takes some 0.8 KiB
with one GPU and 5 KiB with eight, indices included (an event some 0.13 KiB): a hundred orders a day are
30 MiB a year. For a hundred thousand the look at the file makes a start a sixth of a second longer.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from decimal import Decimal
from ipaddress import IPv4Address
from typing import Any, Final

from gpud.model import (
    Gpu,
    Grant,
    GuestInput,
    Instance,
    KnownCard,
    NumaNode,
    PciAddress,
    Quarantine,
    Shape,
    Status,
    Step,
    Tier,
)

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
    """
    ALTER TABLE instance ADD COLUMN nodes TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE instance ADD COLUMN former_drivers TEXT NOT NULL DEFAULT '{}';
    ALTER TABLE instance ADD COLUMN drivers_noted_in TEXT;

    -- What was last learned of the card at an address; a card that differs is not sold.
    CREATE TABLE known_card (
        gpu          TEXT PRIMARY KEY,
        ids          TEXT NOT NULL,
        uuid         TEXT,
        serial       TEXT,
        name         TEXT,
        vram_mib     INTEGER,
        nvlink_peers TEXT NOT NULL,
        nvswitch     INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;

    -- former_drivers: what its functions are to go back to when it is released.
    CREATE TABLE quarantine (
        gpu            TEXT PRIMARY KEY,
        since          REAL NOT NULL,
        reason         TEXT NOT NULL,
        by_operator    INTEGER NOT NULL,
        former_drivers TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;

    -- Resets under way, each with the boot it was begun in: a reset may take the whole server down.
    CREATE TABLE reset_begun (
        gpu     TEXT PRIMARY KEY,
        boot_id TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE event ADD COLUMN gpu TEXT;
    CREATE INDEX event_gpu ON event (gpu, id) WHERE gpu IS NOT NULL;
    -- What is pruned by age is found without reading all.
    CREATE INDEX event_at ON event (at);
    -- The newest instances are found without sorting every one there ever was.
    CREATE INDEX instance_created ON instance (created_at);
    """,
    """
    -- What gets no new orders: a card by its address, or the whole server by an empty one.
    CREATE TABLE drain (
        gpu    TEXT PRIMARY KEY,
        since  REAL NOT NULL,
        reason TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    -- What ended today is found without reading all that ever did.
    CREATE INDEX instance_ended ON instance (ended_at) WHERE ended_at IS NOT NULL;
    """,
)

RESTORED: Final = "restored"
"""Key in ``meta`` of a state that came from a backup, until the operator trusts it again."""

COLUMNS: Final = (
    "upstream_id", "instance_id", "fingerprint", "tier", "gpu_type", "gpu_count", "cpu_cores",
    "memory_mib", "storage_gib", "gpus", "address", "image_digest", "cost_per_hour", "region",
    "datacenter_location", "status", "step", "step_since", "created_at", "running_at", "ended_at",
    "delete_requested_at", "failure", "boot_id", "guest_boots", "boots_at_start",
    "script_exit_code", "restarts", "last_start_at", "drivers_noted_in", "nodes", "former_drivers",
)  # fmt: skip

INSERT: Final = f"INSERT INTO instance ({', '.join(COLUMNS)}) VALUES (:{', :'.join(COLUMNS)})"  # noqa: S608
UPDATE: Final = (
    f"UPDATE instance SET {', '.join(f'{name} = :{name}' for name in COLUMNS)}"  # noqa: S608
    " WHERE upstream_id = :upstream_id"
)

_WITHOUT_BOOT_ID: Final = 2
"""The last version of which there are files that lack this column."""
_PLAIN: Final = COLUMNS[COLUMNS.index("step_since") : COLUMNS.index("nodes")]


def migrate(connection: sqlite3.Connection) -> int:
    """Bring the tables up to date; each migration is one transaction.

    Returns:
        The version the file had before; more than ``len(MIGRATIONS)`` means it is from a newer gpud,
        and nothing was touched.
    """
    before: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if 1 <= before <= _WITHOUT_BOOT_ID:
        _add_boot_id(connection)
    for number, script in enumerate(MIGRATIONS[before:], start=before + 1):
        connection.executescript(
            f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;"
        )
    return before


def _add_boot_id(connection: sqlite3.Connection) -> None:
    """Daemons had run with the first migration when it was edited, to have this column."""
    columns = {row[1] for row in connection.execute("PRAGMA table_info(instance)")}
    if "boot_id" not in columns:
        connection.execute("ALTER TABLE instance ADD COLUMN boot_id TEXT")


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
        "gpus": json.dumps([_gpu_json(gpu) for gpu in grant.gpus]),
        "address": str(grant.address) if grant.address else None,
        "image_digest": grant.image_digest,
        "cost_per_hour": str(grant.cost_per_hour),
        "region": grant.region,
        "datacenter_location": grant.datacenter_location,
        "status": instance.status.value,
        "step": instance.step.value,
        **{name: getattr(instance, name) for name in _PLAIN},
        "nodes": json.dumps([[n.number, n.cpu_cores, n.memory_mib] for n in grant.nodes]),
        "former_drivers": drivers_json(instance.former_drivers),
    }


def drivers_json(drivers: Mapping[PciAddress, str]) -> str:
    """Drivers by PCI function, as text."""
    return json.dumps({str(function): driver for function, driver in drivers.items()})


def drivers_from(text: str) -> dict[PciAddress, str]:
    """What :func:`drivers_json` wrote."""
    found = json.loads(text).items()
    return {PciAddress.parse(function): driver for function, driver in found}


def _gpu_json(gpu: Gpu) -> dict[str, Any]:
    return {
        "address": str(gpu.address),
        "stand_in": gpu.stand_in,
        "functions": [str(function) for function in gpu.functions],
        "numa_node": gpu.numa_node,
        "bundle": gpu.bundle,
        "nvlink": gpu.nvlink,
    }


def _gpu_from_json(gpu_type: str, found: dict[str, Any] | list[Any]) -> Gpu:
    if isinstance(found, list):  # as schema 1 wrote it, when every GPU was a stand-in
        found = {"address": found[0], "stand_in": found[1]}
    return Gpu(
        address=PciAddress.parse(found["address"]),
        gpu_type=gpu_type,
        stand_in=found["stand_in"],
        functions=tuple(PciAddress.parse(one) for one in found.get("functions", ())),
        numa_node=found.get("numa_node"),
        bundle=found.get("bundle", ""),
        nvlink=found.get("nvlink", ""),
    )


def from_row(row: sqlite3.Row) -> Instance:
    """The instance of a row."""
    shape = Shape(
        gpu_type=row["gpu_type"],
        gpu_count=row["gpu_count"],
        cpu_cores=row["cpu_cores"],
        memory_mib=row["memory_mib"],
        storage_gib=row["storage_gib"],
    )
    gpus = tuple(_gpu_from_json(shape.gpu_type, found) for found in json.loads(row["gpus"]))
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
            nodes=tuple(NumaNode(*found) for found in json.loads(row["nodes"])),
        ),
        status=Status(row["status"]),
        step=Step(row["step"]),
        former_drivers=drivers_from(row["former_drivers"]),
        **{name: row[name] for name in _PLAIN},
    )


def known_card_row(card: KnownCard) -> tuple[Any, ...]:
    """The ``known_card`` row of a card."""
    peers = json.dumps([str(peer) for peer in card.nvlink_peers])
    return (
        str(card.address), card.ids, card.uuid, card.serial, card.name, card.vram_mib, peers,
        int(card.nvswitch),
    )  # fmt: skip


def known_card_from(row: sqlite3.Row) -> KnownCard:
    """The card of a ``known_card`` row."""
    return KnownCard(
        address=PciAddress.parse(row["gpu"]),
        ids=row["ids"],
        uuid=row["uuid"],
        serial=row["serial"],
        name=row["name"],
        vram_mib=row["vram_mib"],
        nvlink_peers=tuple(PciAddress.parse(one) for one in json.loads(row["nvlink_peers"])),
        nvswitch=bool(row["nvswitch"]),
    )


def quarantine_from(row: sqlite3.Row) -> Quarantine:
    """The quarantine of a ``quarantine`` row."""
    return Quarantine(
        address=PciAddress.parse(row["gpu"]),
        since=row["since"],
        reason=row["reason"],
        by_operator=bool(row["by_operator"]),
        former_drivers=drivers_from(row["former_drivers"]),
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
