"""Opens the SQLite file safely, or says why it must not be used."""

from __future__ import annotations

import fcntl
import sqlite3
from pathlib import Path
from typing import IO

from gpud.errors import Code, GpudError
from gpud.schema import MIGRATIONS, migrate

_PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = FULL",
    "foreign_keys = ON",
    "secure_delete = ON",
    "busy_timeout = 5000",
)


def lock(state_dir: Path) -> IO[str]:
    """Claim the state directory for this process, until the returned file is closed.

    Raises:
        GpudError: ``STATE_UNUSABLE``: another gpud runs on it, or it cannot be written.
    """
    try:
        if not state_dir.is_dir():
            state_dir.mkdir(parents=True)
            state_dir.chmod(0o711)  # not left to the umask: QEMU's user must pass through
        lock_file = (state_dir / "lock").open("a", encoding="ascii")
    except OSError as error:
        raise GpudError(
            Code.STATE_UNUSABLE, f"state_dir {state_dir} cannot be used: {error.strerror}"
        ) from error
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock_file.close()
        raise GpudError(
            Code.STATE_UNUSABLE, f"another gpud is running on {state_dir}", hint="stop it first"
        ) from error
    return lock_file


def connect(state_dir: Path) -> sqlite3.Connection:
    """Open the state file, creating it only where there was never one, and bring it up to date.

    The connection may be used from any one thread at a time.

    Raises:
        GpudError: ``STATE_UNUSABLE``, saying what is wrong; the file is left as it was.
    """
    path = state_dir / "state.sqlite"
    instances = state_dir / "instances"
    empty = not path.exists() or path.stat().st_size == 0
    if empty and instances.is_dir() and any(instances.iterdir()):
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"{path} is missing or empty although {instances} holds guests",
            hint="restore it from a backup, or move the guests' directories away",
        )
    try:
        path.touch(mode=0o600)
        path.chmod(0o600)  # a restored backup may have come with a wider mode
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise GpudError(Code.STATE_UNUSABLE, f"{path} cannot be opened: {error}") from error
    connection.row_factory = sqlite3.Row
    try:
        fault = _prepare(connection)
    except sqlite3.Error as error:
        fault = str(error)
    if fault is not None:
        connection.close()
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"{path} cannot be used: {fault}",
            hint="restore it from a backup; gpud never starts over with an empty one",
        )
    return connection


def _prepare(connection: sqlite3.Connection) -> str | None:
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    verdict: str = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        return f"it is damaged: {verdict}"
    version = migrate(connection)
    if version > len(MIGRATIONS):
        return f"it was written by a newer gpud (schema {version})"
    return None
