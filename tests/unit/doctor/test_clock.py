from __future__ import annotations

from gpud.doctor.check import Level
from gpud.doctor.clock import clock, kernel_status
from tests.unit.doctor.parts import only

PLL_AND_UNSYNCHRONISED = 0x41


def test_a_clock_that_nobody_keeps_is_a_warning() -> None:
    assert only(clock(PLL_AND_UNSYNCHRONISED))[0] is Level.WARNING
    assert only(clock(0x2001))[0] is Level.OK


def test_the_kernel_tells_its_status() -> None:
    assert 0 <= kernel_status() < 0x10000
