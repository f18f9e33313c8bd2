"""What is known of an image: as it stands in the store, and as it was when it came in."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from gpud.guest.durable import replacing


@dataclass(frozen=True, slots=True)
class Image:
    """A base image as it stands in the store.

    Attributes:
        digest: ``sha256:`` and 64 hex digits: its content.
        path: Its file.
        names: What it is called; empty once another image took over its last name.
        size_bytes: Size of the file.
        virtual_size_bytes: Size of the disk in it; an instance's disk is never smaller.
        added_at: Seconds since the epoch.
        in_use_by: How many instances stand on it.
        sealed: Whether it was found fit to be cloned when it was added.
        fault: Why it cannot be used; empty for a sound image.
    """

    digest: str
    path: Path
    names: tuple[str, ...]
    size_bytes: int
    virtual_size_bytes: int
    added_at: float
    in_use_by: int
    sealed: bool = False
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """The sidecar: what the file was when it was found good.

    Attributes:
        size_bytes: Size of the file.
        mtime_ns: When it was last written to, in nanoseconds since the epoch.
        virtual_size_bytes: Size of the disk in it.
        added_at: Seconds since the epoch.
        sealed: Whether it was found fit to be cloned. Records from before anybody looked have none.
    """

    size_bytes: int
    mtime_ns: int
    virtual_size_bytes: int
    added_at: float
    sealed: bool = False

    def differs(self, found: os.stat_result) -> str:
        """How the file is not what it was; empty where it is."""
        if found.st_size != self.size_bytes:
            return f"its file has {found.st_size} bytes, not {self.size_bytes} as when it was added"
        if found.st_mtime_ns != self.mtime_ns:
            return "its file was written to after it was added"
        return ""


def path_of(image: Path) -> Path:
    """Where the record of an image's file is."""
    return image.with_suffix(".json")


def read(image: Path) -> Record | None:
    """The record of an image's file; None without a readable one."""
    try:
        return Record(**json.loads(path_of(image).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write(image: Path, record: Record) -> None:
    """Put the record of an image's file in place."""
    with replacing(path_of(image), mode=0o644) as stream:
        stream.write(json.dumps(asdict(record)).encode())
