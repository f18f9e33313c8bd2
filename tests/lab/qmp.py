"""The few words of QMP that the lab speaks to its server's QEMU: cards pulled out, the reset button.

QEMU's own reference has them: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any


class Qmp:
    """One connection to QEMU's control socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._events: list[dict[str, Any]] = []

    @classmethod
    async def connect(cls, socket: Path) -> Qmp:
        """Shake hands; after that QEMU takes commands."""
        reader, writer = await asyncio.open_unix_connection(socket)
        qmp = cls(reader, writer)
        await qmp._message()
        await qmp.execute("qmp_capabilities")
        return qmp

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run one command, and return its answer."""
        line = json.dumps({"execute": command, "arguments": arguments})
        self._writer.write(line.encode() + b"\n")
        await self._writer.drain()
        while True:
            message = await self._message()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise AssertionError(f"QEMU refuses {line}: {message['error']['desc']}")
            self._events.append(message)

    async def wait_for(self, event: str, timeout_s: float, **data: object) -> None:
        """Wait until QEMU has told of an event with this data, now or since the connection."""
        async with asyncio.timeout(timeout_s):
            while True:
                for message in self._events:
                    told = message.get("data", {})
                    if message["event"] == event and data.items() <= told.items():
                        self._events.remove(message)
                        return
                self._events.append(await self._message())

    def close(self) -> None:
        self._writer.close()

    async def _message(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line:
            raise AssertionError("QEMU has hung up")
        message: dict[str, Any] = json.loads(line)
        return message
