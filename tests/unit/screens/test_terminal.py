"""A guest's console on an operator's terminal."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpud.screens.terminal import SafeTerminal


def shown(*parts: bytes) -> bytes:
    out = io.BytesIO()
    terminal = SafeTerminal(out)
    for part in parts:
        terminal.write(part)
        terminal.flush()
    terminal.close()
    return out.getvalue().removesuffix(b"\x1b[0m")


@pytest.mark.parametrize(
    ("printed", "seen"),
    [
        ("[\x1b[0;32m  OK  \x1b[0m] Started é\t✓\r\nlogin: ", None),
        ("\x1b]0;root@other\x07", "^[]0;root@other^G"),
        ("\x1b[2J\x1b[6n\x1bPq\x1b\\", "^[[2J^[[6n^[Pq^[\\"),
        ("done\rhidden\b\x7f\0", "done^Mhidden^H^?^@"),
        ("\x9b2J", "M-^[2J"),
        ("\x1b[" + "1" * 40 + "m", "^[[" + "1" * 40 + "m"),
    ],
)
def test_text_and_colours_are_shown_and_nothing_else_is_done(
    printed: str, seen: str | None
) -> None:
    assert shown(printed.encode()).decode() == (printed if seen is None else seen)


@given(
    st.lists(st.sampled_from([b"\x1b", b"[", b"1m", b"2J", b"\r", b"\n", b"\xc2", b"\x9b", b"x"]))
)
def test_how_it_comes_in_pieces_makes_no_difference(parts: list[bytes]) -> None:
    assert shown(*parts) == shown(b"".join(parts))


@given(st.binary())
def test_no_control_character_gets_through_but_in_a_colour(printed: bytes) -> None:
    for part in shown(printed).split(b"\x1b")[1:]:
        assert part.startswith(b"[")
        assert part[1:].lstrip(b"0123456789;").startswith(b"m")
