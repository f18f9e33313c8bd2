"""The server at a glance, on screens of several widths."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from gpud.screens.status import status_screen

OFFER: dict[str, Any] = {
    "gpu_type": "h100_sxm",
    "gpu_count": 1,
    "tier": "on_demand",
    "cpu_cores": 8,
    "ram_gb": 32,
    "storage_gb": 200,
    "price_per_hour": 3.49,
    "stock_status": "Low",
    "available_count": 1,
    "why_not": None,
}
EVENT = {
    "id": 1, "at": 1_800_000_000.0, "upstream_id": "i-0123456789abcdef", "gpu": None,
    "was": "creating/clone_disk", "became": "creating/write_seed", "why": "",
}  # fmt: skip
STATUS: dict[str, Any] = {
    "version": "1.2.3",
    "up_seconds": 7265,
    "ready": True,
    "problems": {},
    "nothing_sold_because": [],
    "drains": [],
    "gpus": {"available": 1, "in_use": 6, "drained": 1, "quarantined": 0},
    "instances": {"running": 5, "creating": 1, "error": 0},
    "offers": [OFFER, {**OFFER, "gpu_count": 8, "available_count": 0, "why_not": "too few GPUs"}],
    "earned_today": {"usd": 123.456, "since": 1_800_000_000.0},
    "events": [EVENT],
}


def shown(told: dict[str, Any], width: int = 100) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(status_screen(told))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_server_that_sells() -> None:
    lines = shown(STATUS)
    assert lines[0] == "gpud 1.2.3  up 2 h 01 min  ready"
    assert lines[2:5] == [
        "GPUs       1 available, 6 in use, 1 drained",
        "Instances  5 running, 1 creating",
        "Today      123.46 USD earned since midnight",
    ]
    assert "h100_sxm  8     on_demand  3.49   sold out  0" in lines
    assert lines[lines.index("h100_sxm x8") + 1] == "  too few GPUs"
    assert lines[-1].endswith("i-0123456789abcdef  creating/clone_disk → creating/write_seed")


def test_what_is_wrong_comes_first() -> None:
    drains = [
        {"gpu": None, "since": 0, "reason": "new kernel"},
        {"gpu": "0000:41:00.0", "since": 1_800_000_000.0, "reason": "new fan"},
        {"gpu": "0000:42:00.0", "since": 1_800_000_000.0, "reason": ""},
    ]
    why = "the server is drained since today"
    told = {**STATUS, "ready": False, "problems": {"libvirt": "does not answer"},
            "nothing_sold_because": [why], "drains": drains}  # fmt: skip
    lines = shown(told)
    assert lines[0].endswith("NOT READY")
    assert lines[1:3] == ["libvirt: does not answer", f"sells nothing: {why}"]
    assert lines[3].startswith("GPU 0000:41:00.0 is drained since 2027-01-1")
    assert (lines[3][-9:], lines[4][-1].isdigit()) == (": new fan", True)
    assert "too few GPUs" not in "".join(lines), "that no offer is to be had has been said"


def test_an_empty_server() -> None:
    empty = {**STATUS, "gpus": {"available": 0}, "instances": {}, "offers": [], "events": []}
    text = "\n".join(shown(empty))
    for words in ("GPUs       none", "Instances  none", "nothing is on offer", "nothing has happ"):
        assert words in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_wider_than_the_screen(width: int) -> None:
    long = {**EVENT, "why": "it went wrong " * 10}
    lines = shown({**STATUS, "events": [long], "nothing_sold_because": ["x" * 300]}, width)
    assert max(map(len, lines)) <= width
