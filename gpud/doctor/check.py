"""What a check says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gpud.errors import GpudError


class Level(StrEnum):
    """How bad it is: a note asks for nothing, a warning can wait, with a fault orders go unfilled."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAULT = "fault"


class Group(StrEnum):
    """What a check is about, in the order in which they are shown."""

    HOST = "Host"
    CARDS = "IOMMU and cards"
    MEMORY = "Memory"
    LIBVIRT = "libvirt"
    IMAGES = "Images"
    STORAGE = "Storage"
    NETWORK = "Network"
    CLOCK = "Clock and certificates"
    TOKENS = "Tokens"
    OFFERS = "Offers"


_STATUS: Final = {Level.OK: 0, Level.NOTE: 0, Level.WARNING: 1, Level.FAULT: 2}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found.

    Attributes:
        name: What was looked at.
        what: How it is, or what is wrong with it.
        mend: A command, or a key of the configuration; empty where there is nothing to do.
    """

    group: Group
    name: str
    level: Level
    what: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is looked at; makes the verdicts on it."""

    group: Group
    name: str

    def ok(self, what: str) -> Verdict:
        """It is well."""
        return self.at(Level.OK, what)

    def note(self, what: str, mend: str = "") -> Verdict:
        """It is well enough, and worth knowing."""
        return self.at(Level.NOTE, what, mend)

    def warning(self, what: str, mend: str) -> Verdict:
        """It should be mended."""
        return self.at(Level.WARNING, what, mend)

    def fault(self, what: str, mend: str) -> Verdict:
        """It must be mended."""
        return self.at(Level.FAULT, what, mend)

    def at(self, level: Level, what: str, mend: str = "") -> Verdict:
        """A verdict of that level."""
        return Verdict(self.group, self.name, level, what, mend)

    def failed(self, error: GpudError, mend: str = "") -> Verdict:
        """A fault in an error's own words; ``mend`` goes over the error's hint."""
        what = "; ".join([error.detail, *(f"{one.where}: {one.what}" for one in error.problems)])
        return self.fault(what, mend or error.hint)


def exit_status(verdicts: Iterable[Verdict]) -> int:
    """0 where all is well, 1 with warnings, 2 with faults."""
    return max((_STATUS[one.level] for one in verdicts), default=0)
