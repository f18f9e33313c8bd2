"""gpud on the edges of the lifecycle's tests, whose record and host a test then sets at odds."""

from __future__ import annotations

from tests.unit.lifecycle.conftest import (
    _quiet_log,
    gpud,
    image,
    kernel,
    libvirtd,
    monotonic,
    pytest_configure,
    qemu_img,
    short_pauses,
    start_gpud,
)

__all__ = [
    "_quiet_log",
    "gpud",
    "image",
    "kernel",
    "libvirtd",
    "monotonic",
    "pytest_configure",
    "qemu_img",
    "short_pauses",
    "start_gpud",
]
