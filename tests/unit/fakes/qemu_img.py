"""``qemu-img`` at the door to programs, for tests that make thousands of disks.

A real one takes some 20 ms and a process for each disk. The disks made here are notes of what was asked
for; ``test_whole_order.py`` also runs with the real program.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from gpud import command
from gpud.command import Completed
from gpud.errors import Code, GpudError

_REAL_RUN = command.run
_HEADER = struct.Struct(">4sIQIIQI")


def base_image(virtual_size_bytes: int = 2**20) -> bytes:
    """The bytes of a qcow2 image, its header at least."""
    header = _HEADER.pack(b"QFI\xfb", 3, 0, 0, 16, virtual_size_bytes, 0)
    return header.ljust(512, b"\0")


class QemuImg:
    """Takes the place of :func:`gpud.command.run`; other programs are run for real.

    Attributes:
        faults: Errors of the next calls that make an overlay.
    """

    def __init__(self) -> None:
        self.faults: list[GpudError] = []

    async def run(self, program: str, *rest: str | Path, **options: Any) -> Completed:
        if program != "qemu-img":
            return await _REAL_RUN(program, *rest, **options)
        verb, *arguments = rest
        if verb == "create":
            return self._create(arguments)
        if verb == "info":
            return Completed(json.dumps(_info(Path(arguments[-1]))), "", 0)
        assert verb == "check"
        return Completed("", "", 0)

    def _create(self, arguments: list[str | Path]) -> Completed:
        if self.faults:
            raise self.faults.pop(0)
        backing = arguments[arguments.index("-b") + 1]
        path, size = Path(arguments[-2]), int(str(arguments[-1]))
        path.write_text(json.dumps({"virtual-size": size, "backing-filename": str(backing)}))
        return Completed("", "", 0)


def failed(detail: str = "qemu-img ended with status 1") -> GpudError:
    """What the door raises for a program that failed."""
    return GpudError(Code.HOST_COMMAND_FAILED, detail)


def _info(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    if content.startswith(b"QFI"):
        return {"virtual-size": _HEADER.unpack_from(content)[5]}
    facts: dict[str, object] = json.loads(content)
    return facts
