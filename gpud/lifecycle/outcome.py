"""What one run of a step can come to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpud.model import Instance, PciAddress, Step


@dataclass(frozen=True, slots=True)
class Hop:
    """The step is done; go to the next.

    Attributes:
        step: The next step.
        why: For the event log, where the reason is not plain from the step.
        changes: Fields of the instance that change in the same commit.
        quarantine: Cards that are quarantined in the same commit, with the reason of each.
    """

    step: Step
    why: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    quarantine: Mapping[PciAddress, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Nap:
    """Nothing to do yet; run the step again after ``seconds``, or earlier when woken.

    Attributes:
        seconds: How long to wait.
        why: For the event log, if this turns out to have been the last wait: what stands in the way.
    """

    seconds: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Fail:
    """The order cannot be kept: give everything back and end as ``error``.

    Attributes:
        message: What the caller is told: no path, no secret.
        why: For the event log, where there is more to say to the operator.
        quarantine: As in :class:`Hop`.
    """

    message: str
    why: str = ""
    quarantine: Mapping[PciAddress, str] = field(default_factory=dict)


Outcome = Hop | Nap | Fail
StepFunction = Callable[[Instance], Awaitable[Outcome]]
