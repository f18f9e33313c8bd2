"""Opens the SQLite file safely, or says why it must not be used."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from gpud.errors import Code, GpudError
from gpud.schema import MIGRATIONS, migrate
from gpud.walfile import wal_fault

STATE_FILE: Final = "state.sqlite"
UNREADABLE: Final = (
    sqlite3.Error, ValueError, TypeError, ArithmeticError, LookupError, AttributeError,
)  # fmt: skip
"""What comes of a column that does not hold what gpud writes there."""

_RETRY_AFTER_S: Final = 30
_PATIENCE = "busy_timeout = 5000"
_PRAGMAS = (
    _PATIENCE,
    "journal_mode = WAL",
    "synchronous = FULL",
    "foreign_keys = ON",
    "secure_delete = ON",
)

_SAME_AGAIN = "REPLACE INTO meta SELECT key, value FROM meta WHERE key = 'owner'"
"""Changes nothing. An UPDATE that changes nothing is not written."""
_LOST = (
    # The sign keeps SQLite from reading the very index that is in question.
    "SELECT upstream_id FROM instance WHERE +step != 'ended'"
    " EXCEPT SELECT upstream_id FROM instance INDEXED BY instance_live WHERE step != 'ended'"
)
"""Live instances by reading all, less those that the index has."""

_RESTORE = (
    "`gpud restore FILE` puts a backup in its place; gpud never starts over with an empty one"
)
_END_THE_OTHER = "another program has it open and locked; `fuser` names it, end it"
_MAKE_WRITABLE = "the daemon's user must be able to write it and the directory it is in"
_MAKE_ROOM = "make room on its file system"
_MENDS: Final = {
    sqlite3.SQLITE_BUSY: _END_THE_OTHER,
    sqlite3.SQLITE_LOCKED: _END_THE_OTHER,
    sqlite3.SQLITE_PERM: _MAKE_WRITABLE,
    sqlite3.SQLITE_READONLY: _MAKE_WRITABLE,
    sqlite3.SQLITE_CANTOPEN: _MAKE_WRITABLE,
    sqlite3.SQLITE_FULL: _MAKE_ROOM,
    sqlite3.SQLITE_IOERR: "see the kernel's log: the disk fails, or is full",
}
_MENDS_OF_FILES: Final = {
    errno.ENOENT: "its directory is not there; is its file system mounted?",
    errno.EACCES: _MAKE_WRITABLE,
    errno.EPERM: _MAKE_WRITABLE,
    errno.EROFS: _MAKE_WRITABLE,
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
}


@dataclass(frozen=True, slots=True)
class Claim:
    """A state directory that is this process's alone, and its file, examined and open."""

    state_dir: Path
    connection: sqlite3.Connection
    lock_file: IO[str]

    def close(self) -> None:
        """Leave the directory to others."""
        self.connection.close()
        self.lock_file.close()


def claim(state_dir: Path) -> Claim:
    """Lock a state directory, and open its file as :func:`connect` does.

    Raises:
        GpudError: ``STATE_UNUSABLE``, as of :func:`lock` and :func:`connect`.
    """
    lock_file = lock(state_dir)
    try:
        return Claim(state_dir, connect(state_dir), lock_file)
    except BaseException:
        lock_file.close()
        raise


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
    path = state_dir / STATE_FILE
    try:
        if not path.exists():
            _create(path)
        if (fault := _misplaced(path) or examine(path, every_index=False)) is not None:
            raise unusable(path, fault)
        path.chmod(0o600)  # a restored backup may have come with a wider mode
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise unusable(path, error) from error
    connection.row_factory = sqlite3.Row
    try:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        migrate(connection)
    except sqlite3.Error as error:
        connection.close()
        raise unusable(path, error) from error
    return connection


def examine(path: Path, *, every_index: bool = True) -> str | None:
    """What speaks against using a state file, read without changing it; None when it is sound.

    Each page is looked at in any case, and whether every live instance is found by the index that a start
    finds it by: one that is not would be taken for an orphan, and its guest ended.

    Args:
        path: The file.
        every_index: Hold each index against its table, which takes six times as long: a second for a
            hundred thousand instances, so a start leaves it to backups and to ``gpud doctor``.

    Raises:
        sqlite3.Error: It cannot be read at all.
    """
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        connection.execute(f"PRAGMA {_PATIENCE}")
        check = "integrity_check" if every_index else "quick_check"
        verdict: str = connection.execute(f"PRAGMA {check}(1)").fetchone()[0]
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if verdict != "ok":
            return f"it is damaged: {verdict}"
        if version > len(MIGRATIONS):
            return f"it was written by a newer gpud (schema {version})"
        if not version:
            return "it is no state of gpud"
        lost = connection.execute(_LOST).fetchone()
    return f"it is damaged: {lost[0]} is missing from index instance_live" if lost else None


def unusable(path: Path, fault: Exception | str) -> GpudError:
    """The refusal to use a state file, with what to do about it."""
    code = getattr(fault, "sqlite_errorcode", None)
    what = fault.strerror if isinstance(fault, OSError) else fault
    if isinstance(fault, Exception) and not isinstance(fault, OSError | sqlite3.Error):
        what = f"it holds what this gpud cannot read: {fault}"
    return GpudError(
        Code.STATE_UNUSABLE,
        f"{path} cannot be used: {what}",
        hint=_MENDS.get(
            (code or 0) & 0xFF, _MENDS_OF_FILES.get(getattr(fault, "errno", 0), _RESTORE)
        ),
    )


def not_written(error: sqlite3.OperationalError) -> GpudError:
    """What is told of a change that the file system does not take at the moment."""
    return GpudError(
        Code.RECORD_UNAVAILABLE,
        f"the record cannot be written at the moment: {error}",
        hint="see `df` and dmesg for the file system of state_dir",
        retry_after_s=_RETRY_AFTER_S,
    )


def empty_log(connection: sqlite3.Connection) -> str | None:
    """Write the log's changes into the file, overwrite the log, and begin it anew.

    Scripts and keys that are gone from the tables are gone from it then, and so is what a commit that
    failed has left there: frames behind those that count, which could be taken for damage.

    Returns:
        Why it could not be done; None when it was. What was committed stays so in any case.
    """
    try:
        blocked = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        # The first write into a new log is a write to the disk more, which no order need wait for.
        connection.execute(_SAME_AGAIN)
    except sqlite3.Error as error:
        return str(error)
    return "a reader is in the way" if blocked else None


def _misplaced(path: Path) -> str | None:
    """What the files beside it tell of, which SQLite takes no notice of."""
    log, index = (path.with_name(f"{path.name}-{suffix}") for suffix in ("wal", "shm"))
    if interrupted(path).exists():
        return f"a restore was broken off; {path.name} may be of before it"
    if not path.is_file():
        return "it is no file"
    if path.stat().st_size == 0:
        return "it is empty"
    if index.exists() and not log.exists():
        return f"{log.name}, with the newest orders, is missing beside {index.name}"
    fault = wal_fault(log)
    return f"{log.name}, with the newest orders, is damaged: {fault}" if fault is not None else None


def interrupted(path: Path) -> Path:
    """Where the new state is while a restore puts it in the place of ``path``."""
    return path.with_name(path.name + ".restoring")


def _create(path: Path) -> None:
    """Make a new state file, which has its name when it is complete, where gpud has never run."""
    left = [path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", ".restoring")]
    left = [file for file in (path.parent / "instances", *left) if file.exists()]
    if left:
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"{path} is missing, although gpud has run here: {left[0]} is there",
            hint="`gpud restore FILE` puts a backup in its place; to start over, for which no guest"
            f" may be left, remove {left[0]} too",
        )
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    try:
        unfinished.touch(mode=0o600)
        with closing(sqlite3.connect(unfinished, isolation_level=None)) as connection:
            migrate(connection)
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def connect_to_read(state_dir: Path) -> sqlite3.Connection:
    """Open the state file for reading alone, whether a daemon has it open or not.

    Raises:
        GpudError: ``STATE_UNUSABLE``: it is not there, not readable, or not of this gpud's version.
    """
    path = state_dir / "state.sqlite"
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
    except sqlite3.Error as error:
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"{path} cannot be opened: {error}",
            hint="ask as root or as the daemon's user, with the daemon's configuration",
        ) from error
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA busy_timeout = 5000")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        fault = None if version == len(MIGRATIONS) else f"it has schema {version}"
    except sqlite3.Error as error:
        fault = str(error)
    if fault is not None:
        connection.close()
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"{path} cannot be read: {fault}",
            hint=f"this gpud reads schema {len(MIGRATIONS)}; the daemon's start brings it up to date",
        )
    return connection
