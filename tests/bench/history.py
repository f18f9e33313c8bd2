"""A record with a past: instances that have ended long ago, and what happened to the latest of them."""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from gpud.model import Gpu, Grant, Instance, NumaNode, PciAddress, Shape, Status, Step, Tier
from gpud.schema import COLUMNS, to_row
from gpud.statefile import STATE_FILE, connect
from tests.bench.core import Bench

_ORDERS_A_DAY = 100
_DAY_S = 86400.0
_EVENT_DAYS = 90
_STEPS = [step.value for step in Step]


def ended_instances(bench: Bench, count: int, state_dir: Path) -> None:
    """Give a state directory a record with so many ended instances; one is made for the whole run."""
    made = bench.directory / f"history-{count}.sqlite"
    if not made.exists():
        bench.say(f"making a record with {count} ended instances")
        _make(count, made)
    shutil.copy(made, state_dir / STATE_FILE)


def _make(count: int, path: Path) -> None:
    work = path.with_suffix(".making")
    work.mkdir()
    insert = f"INSERT INTO instance ({', '.join(COLUMNS)}) VALUES (:{', :'.join(COLUMNS)})"  # noqa: S608
    event = "INSERT INTO event (at, upstream_id, was, became, why) VALUES (?, ?, ?, ?, '')"
    now = time.time()
    with closing(connect(work)) as record:
        record.execute("BEGIN")
        for number in range(count):
            ended_at = now - (count - number) * _DAY_S / _ORDERS_A_DAY
            instance = _ended(number, ended_at)
            record.execute(insert, to_row(instance))
            if now - ended_at < _EVENT_DAYS * _DAY_S:  # older ones are forgotten
                pairs = zip(["", *_STEPS], _STEPS, strict=False)
                record.executemany(
                    event, [(ended_at, instance.upstream_id, was, became) for was, became in pairs]
                )
        record.execute("COMMIT")
        record.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (work / STATE_FILE).rename(path)
    shutil.rmtree(work)


def _ended(number: int, ended_at: float) -> Instance:
    shape = Shape("h100_sxm", 1, 1, 1024, 6)
    return replace(
        example(shape, "sha256:" + "0" * 64),
        instance_id=f"former-{number}", fingerprint="0" * 64, status=Status.TERMINATED,
        step=Step.ENDED, step_since=ended_at, created_at=ended_at - 3600,
        running_at=ended_at - 3500, ended_at=ended_at, delete_requested_at=ended_at - 1,
        boot_id="0" * 36, guest_boots=1, last_start_at=ended_at - 3550,
    )  # fmt: skip


def example(shape: Shape, digest: str) -> Instance:
    """An instance with a stand-in."""
    gpu = Gpu(PciAddress(0, 0, 0, 0), shape.gpu_type, stand_in=True)
    nodes = (NumaNode(0, shape.cpu_cores, shape.memory_mib),)
    grant = Grant(shape, (gpu,), None, digest, Decimal("3.49"), "US", "US-Demo-1", nodes)
    return Instance(
        f"i-{secrets.token_hex(8)}", "bench", "", Tier.SPOT, grant, Status.CREATING,
        Step.CLONE_DISK, 0, 0,
    )  # fmt: skip
