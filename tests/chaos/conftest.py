"""The fixtures and fences of the unit tests, for tests that do worse."""

import pytest

from tests.unit import conftest as unit
from tests.unit.conftest import nvml_library, program_fence, socket_fence
from tests.unit.lifecycle import conftest as lifecycle
from tests.unit.lifecycle.conftest import (
    _quiet_log,
    clock,
    gpud,
    image,
    kernel,
    libvirtd,
    monotonic,
    qemu_img,
    short_pauses,
    start_gpud,
    state_dir,
)

__all__ = [
    "_quiet_log",
    "clock",
    "gpud",
    "image",
    "kernel",
    "libvirtd",
    "monotonic",
    "nvml_library",
    "program_fence",
    "qemu_img",
    "short_pauses",
    "socket_fence",
    "start_gpud",
    "state_dir",
]


def pytest_configure(config: pytest.Config) -> None:
    for one in (unit, lifecycle):
        one.pytest_configure(config)
