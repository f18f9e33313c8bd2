"""A screen that is drawn anew again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from gpud.errors import GpudError

EVERY_S: Final = 2.0


def watch(draw: Callable[[], RenderableType], console: Console, pause_s: float = EVERY_S) -> None:
    """Draw until Ctrl-C; while the daemon is down, that is what is shown.

    Args:
        draw: Asks the daemon, and makes the screen.
        console: A terminal.
        pause_s: Between two drawings.
    """
    with (
        suppress(KeyboardInterrupt),
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            live.update(_drawn(draw), refresh=True)
            time.sleep(pause_s)


def _drawn(draw: Callable[[], RenderableType]) -> RenderableType:
    try:
        return draw()
    except GpudError as error:
        return Group(Text(str(error), style="red"), Text("trying again; Ctrl-C ends", style="dim"))
