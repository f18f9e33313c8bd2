"""Makes changes, and takes them back. What is cut short goes on where it was when it is done again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from gpud import command
from gpud.errors import Code, GpudError
from gpud.host.boot import boot_id
from gpud.setup.change import Change
from gpud.setup.parts import part_of
from gpud.setup.plan import is_proven
from gpud.setup.record import Made, Record, load
from gpud.setup.server import Server

Tell = Callable[[str], None]
_COMMAND_S: Final = 1800.0
"""For an initramfs of each kernel, on a slow disk."""


async def make(changes: Sequence[Change], server: Server, tell: Tell) -> None:
    """Make changes, and write down which.

    Args:
        changes: Those that are to be made.
        server: Where.
        tell: Is told each act before it is done.

    Raises:
        GpudError: Something could not be made; all that was made is written down.
    """
    record = load(server)
    record.undoing = False
    boot = boot_id(server.at("/proc"))
    for change in changes:
        await _make_parts(change, server, record, boot, tell)
    await _run_pending(server, record, tell)
    for change in changes:
        if change.proof is not None and not is_proven(change, server):
            path, text = change.proof
            raise GpudError(
                Code.HOST_COMMAND_FAILED,
                f"{path} does not say {text}, although {', '.join(change.after)} ended well",
                hint="a later file of the boot loader's configuration overrides it: grep -rn"
                " GRUB_CMDLINE /etc/default/grub*",
            )


async def _make_parts(
    change: Change, server: Server, record: Record, boot: str, tell: Tell
) -> None:
    record.boots[change.name] = boot
    record.pending += [one for one in change.after if one not in record.pending]
    record.save(server)
    for part in change.parts:
        if await part.holds(server):
            continue
        made = record.made.setdefault(part.key, Made())
        made.after_undo, made.at_boot = list(change.after_undo), bool(change.at_boot)
        made.fingerprints.append(part.fingerprint)
        record.save(server)
        tell(part.act)
        await part.make(server)
        made.fingerprints = [part.fingerprint]
        record.save(server)


@dataclass(frozen=True, slots=True)
class Undone:
    """What taking back came to.

    Attributes:
        left: What is left as it is, and why.
        until_boot: What was taken back and stays in force until a boot.
    """

    left: tuple[str, ...]
    until_boot: tuple[str, ...]


async def undo(server: Server, tell: Tell) -> Undone:
    """Take back what was made, the last first.

    Args:
        server: Where.
        tell: Is told each act before it is done.

    Raises:
        GpudError: Something could not be taken back.
    """
    record = load(server)
    left, until_boot = [], []
    if not record.undoing:
        record.undoing, record.pending = True, []
    for key in reversed(list(record.made)):
        part, made = part_of(key), record.made[key]
        if what := part.in_the_way(server, made.fingerprints):
            left.append(what)
            continue
        record.pending += [one for one in made.after_undo if one not in record.pending]
        record.save(server)
        tell(f"takes back {key}")
        await part.unmake(server)
        until_boot += [key] if made.at_boot else []
        del record.made[key]
        record.save(server)
    await _run_pending(server, record, tell)
    return Undone(tuple(left), tuple(until_boot))


async def _run_pending(server: Server, record: Record, tell: Tell) -> None:
    """Run what is to be run; what fails is there still the next time."""
    for line in tuple(record.pending):
        tell(f"runs {line}")
        await command.run(*shlex.split(line), timeout_s=_COMMAND_S)
        record.pending.remove(line)
        record.save(server)
