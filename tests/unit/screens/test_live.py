"""A screen that is drawn anew until Ctrl-C."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.text import Text

from gpud.errors import Code, GpudError
from gpud.screens.live import watch


def drawing(frames: Iterator[str | Exception]) -> Callable[[], RenderableType]:
    def draw() -> RenderableType:
        frame = next(frames, None)
        if frame is None:
            raise KeyboardInterrupt
        if isinstance(frame, Exception):
            raise frame
        return Text(frame)

    return draw


def test_it_is_drawn_over_and_over_and_goes_on_when_the_daemon_is_back() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, height=20)
    gone = GpudError(Code.STATE_UNUSABLE, "no daemon answers", hint="systemctl status gpud")
    watch(drawing(iter(["one", gone, "two"])), console, pause_s=0)
    text = screen.getvalue()
    places = [text.index(words) for words in ("one", "no daemon answers", "trying again", "two")]
    assert places == sorted(places)
    assert "\x1b[?1049h" in text, "on a screen of its own"
    assert text.rindex("\x1b[?1049l") > places[-1], "which is left at the end"
