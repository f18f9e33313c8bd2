"""Tells whether SQLite's write-ahead log would silently lose what was committed.

SQLite reads the log up to the first frame that does not add up, which after a crash is where the last
transaction was cut short, and takes no notice of what comes behind. Where that is more than one
transaction could have left, the log is damaged. Format: https://www.sqlite.org/fileformat2.html#walformat
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

_MAGIC: Final = {0x377F0682: "<", 0x377F0683: ">"}
"""First word of a log; which byte order its checksums are reckoned in."""
_HEADER_BYTES: Final = 32
_FRAME_HEADER_BYTES: Final = 24

Sums = tuple[int, int]


def wal_fault(wal: Path) -> str | None:
    """What is wrong with a write-ahead log; None when SQLite will find in it all that was committed.

    A damaged last transaction cannot be told from one that a crash cut short.

    Raises:
        OSError: It cannot be read.
    """
    log = wal.read_bytes() if wal.exists() else b""
    if not any(log):  # nothing was committed into it, or not even its header reached the disk
        return None
    order = _MAGIC.get(int.from_bytes(log[:4], "big"), "")
    sums = _checksum(order, log[:24], (0, 0)) if order and len(log) >= _HEADER_BYTES else None
    if sums is None or sums != struct.unpack(">II", log[24:32]):
        return "its header is damaged"
    return _lost(log, order, sums)


def _lost(log: bytes, order: str, sums: Sums) -> str | None:
    """Follow the frames as SQLite does; behind the end there is at most a transaction cut short."""
    page_bytes, salts = int.from_bytes(log[8:12], "big"), log[16:24]
    frame_bytes = _FRAME_HEADER_BYTES + page_bytes
    sound, commits_behind = True, 0
    for start in range(_HEADER_BYTES, len(log) - frame_bytes + 1, frame_bytes):
        frame = log[start : start + frame_bytes]
        if sound:
            sums = _checksum(order, frame[:8], sums)
            sums = _checksum(order, frame[_FRAME_HEADER_BYTES:], sums)
            sound = frame[8:16] == salts and sums == struct.unpack(">II", frame[16:24])
        if not sound and frame[8:16] == salts and any(frame[4:8]):
            commits_behind += 1
    # A commit is on disk before the next begins (synchronous = FULL): a crash cuts one alone.
    return "committed transactions in it are damaged" if commits_behind > 1 else None


def _checksum(order: str, data: bytes, sums: Sums) -> Sums:
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
