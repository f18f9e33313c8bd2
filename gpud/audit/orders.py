"""Whether every accepted order gets on, and is told of as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gpud.audit.facts import Facts, Finding, Kind, place
from gpud.lifecycle.cards import step_limit_s
from gpud.model import RELEASE_STEPS, Instance, Status

_GRACE_S: Final = 90.0
"""Beyond a deadline: the longest pause between two tries of a step, and a try."""


def orders(facts: Facts) -> Iterator[Finding]:
    """Orders that are stuck, lack what they were given, or are told of as what they are not."""
    for instance in facts.record.live.values():
        yield from _stuck(instance, facts)
        if instance.status not in _statuses(instance):
            yield Finding(
                Kind.CONTRADICTION,
                instance.upstream_id,
                f"is told as {instance.status.value}, and is at step {instance.step.value}",
                "look at its events, and report it: it is a defect of gpud",
            )
        if instance.upstream_id not in facts.record.guest_inputs:
            yield Finding(
                Kind.LOST_ORDER,
                instance.upstream_id,
                "is live, and the record has lost the keys and the script of its guest",
                "restore the state file from a backup, or have the instance terminated",
            )
    yield from _told(facts)


def _stuck(instance: Instance, facts: Facts) -> Iterator[Finding]:
    limit_s = step_limit_s(facts.config.deadlines, instance)
    if limit_s is None or facts.told is None:  # without a daemon nothing moves, which is said
        return
    since = max(instance.step_since, facts.told.since)  # a daemon gives each step its whole time
    if facts.now - since > limit_s + _GRACE_S:
        yield Finding(
            Kind.LOST_ORDER,
            instance.upstream_id,
            f"has been at step {instance.step.value} for longer than its {limit_s:g} s",
            f"journalctl -u gpud | grep {instance.upstream_id} says what keeps it",
        )


def _statuses(instance: Instance) -> set[Status]:
    """What an instance may be told as at its step."""
    if instance.step in RELEASE_STEPS:
        return {Status.STOPPING, Status.ERROR}
    alive = Status.RUNNING if instance.running_at is not None else Status.CREATING
    return {alive} if instance.delete_requested_at is None else {Status.STOPPING}


def _told(facts: Facts) -> Iterator[Finding]:
    if facts.told is None:
        return
    recorded = {key: place(one) for key, one in facts.record.live.items()}
    for upstream_id in sorted({*recorded, *facts.told.places}):
        written = recorded.get(upstream_id, "ended")
        said = facts.told.places.get(upstream_id, "ended")
        if written != said:
            yield Finding(
                Kind.CONTRADICTION,
                upstream_id,
                f"is {said} by what the daemon says, and {written} by its record",
                "systemctl restart gpud (guests keep running)",
            )
