"""What a guest has printed, made harmless for the terminal that it is shown on."""

from __future__ import annotations

import re
from typing import BinaryIO, Final

_BEGUN: Final = re.compile(rb"(?:\x1b(?:\[[0-9;]{0,30})?|\r|\xc2)\Z")
"""What the next bytes decide on."""
_CONTROL: Final = re.compile(
    rb"(?P<kept>\x1b\[[0-9;]{0,30}m|\r\n|[\n\t])|(?P<c0>[\x00-\x1f\x7f])|\xc2(?P<c1>[\x80-\x9f])"
)


class SafeTerminal:
    """A terminal on which a tenant can write text and colours, and nothing else.

    Other control characters could retitle the window, move the cursor over what stood there, or have
    the terminal type an answer (ECMA-48, xterm's "Control Sequences"). They are shown as ``cat -v`` does.

    Args:
        out: The terminal.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._held = b""

    def write(self, text: bytes) -> None:
        """Show text, but for an end of it that may be the begin of a sequence."""
        text = self._held + text
        begun = _BEGUN.search(text)
        self._held = begun[0] if begun else b""
        self._out.write(_CONTROL.sub(_shown, text.removesuffix(self._held)))

    def flush(self) -> None:
        """Have the terminal show what was written."""
        self._out.flush()

    def close(self) -> None:
        """Show what was held; the colours end."""
        self._out.write(_CONTROL.sub(_shown, self._held) + b"\x1b[0m")
        self._held = b""
        self._out.flush()


def _shown(found: re.Match[bytes]) -> bytes:
    if found["kept"]:
        return found["kept"]
    if found["c0"]:
        return b"^" + bytes([found["c0"][0] ^ 0x40])
    return b"M-^" + bytes([found["c1"][0] ^ 0xC0])
