"""One instance in full."""

from __future__ import annotations

from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from gpud.screens.parts import Row, events, facts, heading
from gpud.tables import STYLES, duration, local_time

_STEADY: Final = ("running", "ended")


def instance_screen(told: Row) -> RenderableType:
    """All of ``/instances/{id}``."""
    status = told["status"]
    upstream_id = told["upstream_id"]
    return Group(
        facts(
            (
                ("ID", upstream_id),
                ("Ordered as", f"{told['instance_id']}, {local_time(told['created_at'])}"),
                ("Status", Text(status, style=STYLES.get(status, ""))),
                ("Failure", Text(told["failure"] or "", style="red")),
                ("Step", _step(told)),
                ("Running", _running(told)),
                ("Delete asked", _moment(told["delete_requested_at"])),
                ("Ended", _moment(told["ended_at"])),
                ("GPUs", f"{told['gpu_type']} x{len(told['gpus'])}: {', '.join(told['gpus'])}"),
                ("Size", _size(told)),
                ("Address", f"{told['address'] or 'none of its own'}, MAC {told['mac']}"),
                ("Sold", _sold(told)),
                ("Guest", _guest(told)),
                ("Script", _script(told)),
                ("Domain", told["domain"]),
                ("Image", told["image_digest"]),
                ("Console", _console(told)),
            )
        ),
        heading("Last events"),
        events(told["events"], whom=False),
    )


def _moment(at: float | None) -> str:
    return local_time(at) if at is not None else ""


def _step(told: Row) -> str:
    step, since = told["step"], local_time(told["step_since"])
    if step in _STEADY:
        return ""
    spent = f"{step} since {since} ({duration(told['in_step_seconds'])})"
    if told["step_due_at"] is None:
        return spent
    end = "given up at" if told["can_be_given_up"] else "tried until it is done; late from"
    return f"{spent}, {end} {local_time(told['step_due_at'])}"


def _running(told: Row) -> str:
    if told["running_at"] is None:
        return ""
    return f"since {local_time(told['running_at'])} ({duration(told['uptime_seconds'])})"


def _size(told: Row) -> str:
    size = (
        f"{told['cpu_cores']} cores, {told['memory_mib'] / 1024:g} GiB of memory,"
        f" {told['storage_gib']} GiB of disk"
    )
    nodes = ", ".join(map(str, told["numa_nodes"]))
    return f"{size}, NUMA node {nodes}" if nodes else size


def _sold(told: Row) -> str:
    return (
        f"{told['tier']} in {told['region']} at {told['cost_per_hour']:.2f} USD/h,"
        f" {told['cost_so_far']:.2f} USD so far"
    )


def _guest(told: Row) -> str:
    if told["last_start_at"] is None:
        return "not started yet"
    boots = told["boots"]
    return (
        f"started {local_time(told['last_start_at'])}, {boots} boot{'s' * (boots != 1)} reported,"
        f" {told['restarts']} restarts in a row"
    )


def _script(told: Row) -> str:
    code = told["script_exit_code"]
    if code is not None:
        return f"ended with exit code {code}"
    return "has not ended" if told["boots"] else "not reported as started"


def _console(told: Row) -> str:
    kept = told["console_bytes"]
    return f"{kept} bytes kept: gpud console {told['upstream_id']}" if kept else "nothing kept"
