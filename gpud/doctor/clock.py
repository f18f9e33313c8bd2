"""Check of the clock, by which tokens are judged and instances billed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Final

from gpud.doctor.check import Check, Group, Verdict

_CLOCK: Final = Check(Group.CLOCK, "clock")
_UNSYNCHRONISED: Final = 0x0040
"""``STA_UNSYNC`` (include/uapi/linux/timex.h)."""
_MORE_THAN_TIMEX: Final = 256


class _Timex(ctypes.Structure):
    """The head of ``struct timex`` (adjtimex(2)); with no ``modes`` the call only reads."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * _MORE_THAN_TIMEX),
    )


def kernel_status() -> int:
    """The kernel's own word on its clock: bits ``STA_*`` of adjtimex(2)."""
    timex = _Timex()
    ctypes.CDLL(None).adjtimex(ctypes.byref(timex))
    return int(timex.status)


def clock(status: int) -> Iterator[Verdict]:
    """Whether the clock is kept in step."""
    if status & _UNSYNCHRONISED:
        yield _CLOCK.warning(
            "is not synchronised, and tokens are judged by it",
            "apt install chrony, or timedatectl set-ntp true",
        )
    else:
        yield _CLOCK.ok("synchronised")
