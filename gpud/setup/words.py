"""The plan in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpud.setup.change import Change, Item, State
from gpud.setup.parts import TextFile


def lines(items: Sequence[Item]) -> Iterator[str]:
    """The whole plan, what is to be done first."""
    changes = [one.change for one in items if one.change is not None]
    if changes:
        yield "Changes to this server:"
        for number, change in enumerate(changes, 1):
            yield ""
            yield f"{number}. {change.name}: {change.what}"
            yield from (f"   {line}" for line in _change(change))
        yield ""
    yield from _section("To be done by hand:", _of(items, State.BY_HAND))
    yield from _section("Made, and in force with the next boot:", _of(items, State.REBOOT))
    yield from _section("As it should be:", _of(items, State.FINE))


def ending(items: Sequence[Item]) -> str:
    """What is left, in one sentence."""
    waiting, by_hand = _of(items, State.REBOOT), _of(items, State.BY_HAND)
    told = []
    if changes := _of(items, State.CHANGE):
        told.append("to be made by gpud setup: " + ", ".join(one.name for one in changes))
    if waiting:
        told.append("reboot this server: " + "; ".join(f"{one.name}: {one.why}" for one in waiting))
    if by_hand:
        names = ", ".join(dict.fromkeys(one.name for one in by_hand))
        told.append(f"to be done by hand: {names}")
    return ". ".join(told) or "this server needs nothing"


def exit_status(items: Sequence[Item]) -> int:
    """0 nothing is left, 3 a reboot is needed, 1 something else is left."""
    states = {one.state for one in items}
    if State.CHANGE in states:
        return 1
    if State.REBOOT in states:
        return 3
    return 1 if State.BY_HAND in states else 0


def _of(items: Sequence[Item], state: State) -> list[Item]:
    return [one for one in items if one.state is state]


def _change(change: Change) -> Iterator[str]:
    yield f"why: {change.why}"
    for part in change.parts:
        content = part.content if isinstance(part, TextFile) else ""
        yield f"{part.act}:" if content else part.act
        yield from (f"  | {line}".rstrip() for line in content.splitlines())
    yield from (f"runs {line}" for line in change.after)
    if change.at_boot and not change.in_force:
        yield f"in force with the next boot: {change.at_boot}"
    yield f"undo: {change.undo}"
    yield from (f"! {line}" for line in change.warnings)


def _section(title: str, items: Sequence[Item]) -> Iterator[str]:
    if items:
        yield title
        for one in items:
            yield f"  {one.name}: {one.what}"
            yield from (f"    > {line}" for line in (one.mend or one.why,) if line)
        yield ""
