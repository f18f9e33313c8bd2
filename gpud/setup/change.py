"""What a look at a server comes to: changes to make, things to do by hand, and what is well."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gpud.setup.parts import Part, TextFile

MARK = "# Made by `gpud setup`; `gpud setup --undo` takes it back.\n"
"""Head of every file that is written."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something that is changed in the host.

    Attributes:
        name: What it is about.
        what: What is done, in words.
        why: What needs it.
        undo: How it is undone by hand, which ``gpud setup --undo`` does for all at once.
        parts: What is made, in this order.
        after: Commands that put it into force.
        after_undo: Commands that its undoing ends with.
        proof: A file and what it must say after that; None where nothing is to be seen.
        at_boot: What only a boot puts into force; empty where ``after`` does all.
        in_force: The kernel does already as it should.
        warnings: What may surprise.
    """

    name: str
    what: str
    why: str
    undo: str
    parts: tuple[Part, ...]
    after: tuple[str, ...] = ()
    after_undo: tuple[str, ...] = ()
    proof: tuple[str, str] | None = None
    at_boot: str = ""
    in_force: bool = True
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What is made, for programs."""
        return {
            "parts": [part.key for part in self.parts],
            "files": {one.path: one.content for one in self.parts if isinstance(one, TextFile)},
            "commands": list(self.after),
            "undo": self.undo,
            "at_boot": self.at_boot,
        }


class State(StrEnum):
    """What is left to do about something."""

    FINE = "fine"
    CHANGE = "change"
    REBOOT = "reboot"
    BY_HAND = "by_hand"


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that was looked at.

    Attributes:
        what: How it is, or what is to be done.
        why: What needs it.
        mend: What to do by hand.
        change: What ``gpud setup`` makes of it.
    """

    name: str
    state: State
    what: str
    why: str = ""
    mend: str = ""
    warnings: tuple[str, ...] = ()
    change: Change | None = None

    def as_json(self) -> dict[str, Any]:
        """The item for programs."""
        return {
            "name": self.name,
            "state": self.state.value,
            "what": self.what,
            "why": self.why,
            "mend": self.mend,
            "warnings": list(self.warnings),
            "change": self.change.as_json() if self.change is not None else None,
        }


def fine(name: str, what: str) -> Item:
    """It is as it should be."""
    return Item(name, State.FINE, what)


def by_hand(name: str, what: str, mend: str) -> Item:
    """It is for the operator to do."""
    return Item(name, State.BY_HAND, what, mend=mend)
