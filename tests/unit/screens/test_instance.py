"""One instance in full, at each part of its life."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from gpud.screens.instance import instance_screen

AT = 1_800_000_000.0
RUNNING: dict[str, Any] = {
    "upstream_id": "i-0123456789abcdef",
    "instance_id": "gpuai-1",
    "status": "running",
    "step": "running",
    "step_since": AT,
    "in_step_seconds": 61,
    "step_due_at": None,
    "can_be_given_up": False,
    "gpu_type": "h100_sxm",
    "gpus": ["0000:41:00.0", "0000:42:00.0"],
    "tier": "spot",
    "cpu_cores": 8,
    "memory_mib": 32768,
    "storage_gib": 200,
    "numa_nodes": [0, 1],
    "address": "10.0.0.2",
    "mac": "52:00:00:00:00:01",
    "region": "US",
    "cost_per_hour": 6.98,
    "cost_so_far": 14.2,
    "uptime_seconds": 7265,
    "created_at": AT,
    "running_at": AT,
    "delete_requested_at": None,
    "ended_at": None,
    "last_start_at": AT,
    "boots": 2,
    "restarts": 1,
    "script_exit_code": 3,
    "failure": None,
    "domain": "gpud-i-0123456789abcdef",
    "image_digest": "sha256:0",
    "console_bytes": 12,
    "events": [{"id": 1, "at": AT, "upstream_id": "i-0123456789abcdef", "gpu": None, "was": "",
                "became": "creating/lease_address", "why": "order accepted"}],
}  # fmt: skip
CREATING = {
    **RUNNING, "status": "creating", "step": "clone_disk", "step_due_at": AT + 120,
    "can_be_given_up": True, "running_at": None, "last_start_at": None, "boots": 0,
    "script_exit_code": None, "address": None, "console_bytes": 0, "numa_nodes": [],
}  # fmt: skip
STOPPING = {
    **RUNNING, "status": "error", "step": "clean_gpus", "step_due_at": AT + 120,
    "failure": "[red]no boot[/red]", "delete_requested_at": AT, "script_exit_code": None, "boots": 1,
}  # fmt: skip


def shown(told: dict[str, Any], width: int = 120) -> dict[str, str]:
    """The facts by name, each in one line."""
    console = Console(width=width)
    with console.capture() as captured:
        console.print(instance_screen(told))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert max(map(len, lines)) <= width
    named = lines[0].index(told["upstream_id"])
    found: dict[str, str] = {}
    name = ""
    for line in lines[: lines.index("Last events")]:
        name = line[:named].strip() or name
        found[name] = f"{found.get(name, '')} {line[named:].strip()}".strip()
    return found


def test_one_that_runs() -> None:
    told = shown(RUNNING)
    assert told["Status"] == "running"
    assert told["Running"].endswith("(2 h 01 min)")
    assert told["GPUs"] == "h100_sxm x2: 0000:41:00.0, 0000:42:00.0"
    assert told["Size"] == "8 cores, 32 GiB of memory, 200 GiB of disk, NUMA node 0, 1"
    assert told["Address"] == "10.0.0.2, MAC 52:00:00:00:00:01"
    assert told["Sold"] == "spot in US at 6.98 USD/h, 14.20 USD so far"
    assert told["Guest"].endswith("2 boots reported, 1 restarts in a row")
    assert told["Script"] == "ended with exit code 3"
    assert told["Console"] == "12 bytes kept: gpud console i-0123456789abcdef"
    assert told.keys().isdisjoint({"Step", "Failure", "Ended", "Delete asked"})


def test_one_that_is_made() -> None:
    told = shown(CREATING)
    assert "(1 min 01 s), given up at 2027-01-1" in told["Step"]
    assert (told["Guest"], told["Script"]) == ("not started yet", "not reported as started")
    assert told["Console"] == "nothing kept"
    assert told["Address"].startswith("none of its own")
    assert "Running" not in told
    assert "NUMA" not in told["Size"]


def test_one_that_is_given_back() -> None:
    told = shown(STOPPING)
    assert told["Failure"] == "[red]no boot[/red]"
    assert ", tried until it is done; late from 2027-01-1" in told["Step"]
    assert told["Delete asked"].startswith("2027-01-1")
    assert told["Guest"].endswith("1 boot reported, 1 restarts in a row")
    assert told["Script"] == "has not ended"


def test_one_in_a_step_without_a_limit() -> None:
    assert shown({**CREATING, "step_due_at": None})["Step"].endswith("(1 min 01 s)")


def test_one_that_has_ended() -> None:
    told = shown({**RUNNING, "status": "terminated", "step": "ended", "ended_at": AT, "events": []})
    assert told["Ended"].startswith("2027-01-1")
    assert "Step" not in told


@pytest.mark.parametrize("told", [RUNNING, CREATING, STOPPING], ids=lambda one: one["status"])
def test_it_fits_a_narrow_screen(told: dict[str, Any]) -> None:
    assert shown(told, 80)["ID"] == "i-0123456789abcdef"
