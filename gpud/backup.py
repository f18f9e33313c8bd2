"""Copies of the state, and their way back.

A backup holds what the guests that run were given, secrets too. A state that comes back knows nothing
of guests ordered since: it is marked, and until the operator trusts it (``gpud check --repair``) what it
does not know is shown and not removed, and nothing is sold.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from gpud.errors import Code, GpudError
from gpud.guest import durable
from gpud.schema import RESTORED
from gpud.statefile import STATE_FILE, examine, interrupted, lock, unusable

_MODE: Final = 0o600


def back_up(state_dir: Path, target: Path) -> None:
    """Write a consistent, verified copy of the state to ``target``, whether a daemon runs or not.

    The daemon is not held up: a reader of a write-ahead log blocks no writer.

    Raises:
        GpudError: There is something at ``target``, the state is missing or damaged, or there is no room.
    """
    if target.is_symlink() or target.exists():
        raise GpudError(
            Code.STATE_UNUSABLE, f"{target} is there already", hint="give the backup another name"
        )
    with _finished_as(target) as unfinished:
        _copy(state_dir / STATE_FILE, unfinished)


def restore(state_dir: Path, source: Path, clock: Callable[[], float] = time.time) -> Path | None:
    """Put a backup in the place of the state; it is marked as such.

    Until it is in place a daemon refuses to start, and a restore that is cut short is simply repeated.

    Args:
        state_dir: The daemon's; no daemon may be running on it.
        source: The backup, which is only read.
        clock: Seconds since the epoch.

    Returns:
        Where the state that was replaced is kept; None when there was none.

    Raises:
        GpudError: A daemon runs, or ``source`` is no sound state of this gpud or an older one.
    """
    path = state_dir / STATE_FILE
    with lock(state_dir) as lock_file:
        with _finished_as(interrupted(path)) as unfinished:
            _copy(source, unfinished)
            _mark(unfinished, clock())
            _own(state_dir, unfinished, Path(lock_file.name))
        try:
            kept = _set_aside(path, clock())
            durable.commit(interrupted(path), path)
        except OSError as error:
            raise unusable(path, error) from error
    return kept


@contextmanager
def _finished_as(target: Path) -> Iterator[Path]:
    """A new file for the body to write, which has its name when it is complete, or never."""
    unfinished = durable.temporary(target)
    try:
        unfinished.unlink(missing_ok=True)
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _MODE))
        yield unfinished
        durable.sync(unfinished)
        durable.commit(unfinished, target)
    except OSError as error:
        raise unusable(target, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a state as of one moment, log and all, into one file that stands alone."""
    if not source.is_file():
        raise GpudError(Code.STATE_UNUSABLE, f"there is no state at {source}")
    try:
        with (
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as state,
            closing(sqlite3.connect(target)) as copy,
        ):
            state.execute("PRAGMA busy_timeout = 5000")
            state.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        fault = examine(target) or _foreign(target)
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
        raise unusable(target if full else source, error) from error
    if fault is not None:
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"{source} is no sound state: {fault}",
            hint="nothing was changed; take another backup",
        )


def _foreign(path: Path) -> str | None:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as copy:
        names = {row[0] for row in copy.execute("SELECT name FROM sqlite_master")}
        ours = {"meta", "instance", "gpu_claim", "event"} <= names
        query = "SELECT 1 FROM meta WHERE key = 'owner'"
        return None if ours and copy.execute(query).fetchone() else "it is not of gpud"


def _mark(path: Path, now: float) -> None:
    why = (
        "the state was restored from a backup; what it does not know is left alone and nothing is sold"
        " until `gpud check --repair`"
    )
    with closing(sqlite3.connect(path)) as state, state:
        state.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (RESTORED, f"{now:.0f}"))
        state.execute(
            "INSERT INTO event (at, upstream_id, was, became, why) VALUES (?, '', '', ?, ?)",
            (now, "restored", why),
        )


def _own(state_dir: Path, *files: Path) -> None:
    """Give what root makes here to the daemon's user, whose directory it is."""
    owner = state_dir.stat()
    if os.geteuid() == 0:
        for file in files:
            os.chown(file, owner.st_uid, owner.st_gid)


def _set_aside(path: Path, now: float) -> Path | None:
    """Keep the state that is replaced, if not empty, with its log, which may hold the newest part."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    kept = path.with_name(f"{path.name}.before-restore-{stamp}")
    if kept.exists():
        raise GpudError(Code.STATE_UNUSABLE, f"{kept} is there already", hint="try again")
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
    found = None
    for suffix in ("-wal", ""):
        file = path.with_name(path.name + suffix)
        if file.exists() and file.stat().st_size:
            file.chmod(_MODE)
            found = file.rename(path.with_name(kept.name + suffix))
    durable.sync(path.parent)
    return kept if found is not None else None
