"""The fixtures and fences of the unit tests, for tests that do worse."""

import pytest

from tests.unit import conftest as unit
from tests.unit.conftest import (
    clock,
    nvml_library,
    nvml_on,
    program_fence,
    socket_fence,
    state_dir,
)
from tests.unit.lifecycle import conftest as lifecycle
from tests.unit.lifecycle.conftest import (
    _quiet_log,
    gpud,
    image,
    kernel,
    libvirtd,
    monotonic,
    qemu_img,
    short_pauses,
    start_gpud,
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
    "nvml_on",
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
