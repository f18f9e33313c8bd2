"""What the documents for people tell to type, and what they say comes of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = (
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("cloud-init/**/README.md")),
)
ELLIPSIS: Final = "…"
"""A line of output that stands for those left out."""

_PROMPT: Final = re.compile(r"[$#] (?P<command>.*)")
_BLOCK: Final = re.compile(r"^```console\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_STATUS: Final = "echo $?"
_INLINE: Final = re.compile(r"`(gpud(?:\s+[^`]+)?)`")


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a ``console`` block.

    Attributes:
        page: The document, from the repository's root on.
        line: Where it is in it.
        text: As it is typed, without its prompt; it may have several lines.
        output: What is shown to come of it.
        status: The exit status that is shown, by ``echo $?`` right behind it; 0 without.
    """

    page: str
    line: int
    text: str
    output: tuple[str, ...]
    status: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def commands_of(page: Path) -> Iterator[Command]:
    """The commands of a document, in their order."""
    text = page.read_text()
    name = str(page.relative_to(ROOT))
    for block in _BLOCK.finditer(text):
        first = text.count("\n", 0, block.start("body")) + 1
        yield from _with_statuses(list(_typed(name, first, block["body"].splitlines())))


def inline_commands(text: str) -> Iterator[str]:
    """Commands of gpud's that are named in running text, on one line each."""
    for found in _INLINE.finditer(text):
        yield " ".join(found[1].split())


def _typed(page: str, first: int, lines: list[str]) -> Iterator[Command]:
    at = 0
    while at < len(lines):
        start, prompt = at, _PROMPT.fullmatch(lines[at])
        if prompt is None:
            raise ValueError(f"{page}:{first + at}: output without a command")
        text = prompt["command"]
        at += 1
        while not _complete(text):
            text += f"\n{lines[at]}"
            at += 1
        shown = at
        while at < len(lines) and not _PROMPT.fullmatch(lines[at]):
            at += 1
        yield Command(page, first + start, text, tuple(lines[shown:at]), 0)


def _with_statuses(typed: list[Command]) -> Iterator[Command]:
    for one, following in zip(typed, [*typed[1:], None], strict=True):
        if one.text == _STATUS:
            continue
        status = int(following.output[0]) if following and following.text == _STATUS else 0
        yield Command(one.page, one.line, one.text, one.output, status)


def _complete(text: str) -> bool:
    """Whether the shell would not ask for another line."""
    if text.endswith("\\"):
        return False
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True
