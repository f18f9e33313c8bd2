"""What ``gpud setup`` made, so that it takes back just that.

It lies where only root writes: the daemon's own directory would let the daemon's user have root remove
files and run commands. Each thing is written down before it is made.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from gpud.errors import Code, GpudError
from gpud.guest.durable import replacing
from gpud.setup.parts import part_of
from gpud.setup.server import Server

PATH: Final = "/var/lib/gpud-setup/made.json"
_VERSION: Final = 1


@dataclass(slots=True)
class Made:
    """A part that was made.

    Attributes:
        fingerprints: Of the state that was made last, and of one that may just have been.
        after_undo: Commands that taking it back ends with.
        at_boot: Taking it back is in force with the next boot only.
    """

    fingerprints: list[str] = field(default_factory=list)
    after_undo: list[str] = field(default_factory=list)
    at_boot: bool = False


@dataclass(slots=True)
class Record:
    """All that was made, in its order.

    Attributes:
        made: By the part's key.
        pending: Commands that are still to be run.
        undoing: They are what taking back ends with.
        boots: The boot in which each change was made last, by its name.
    """

    made: dict[str, Made] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)
    undoing: bool = False
    boots: dict[str, str] = field(default_factory=dict)

    def fingerprints(self, key: str) -> list[str]:
        """Those of a part; empty for one that was not made."""
        return self.made[key].fingerprints if key in self.made else []

    def save(self, server: Server) -> None:
        """Put it to disk; one of nothing leaves nothing there.

        Raises:
            GpudError: It cannot be written.
        """
        path = server.at(PATH)
        try:
            if not (self.made or self.pending):
                path.unlink(missing_ok=True)
                if path.parent.is_dir():
                    path.parent.rmdir()
                return
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(path, mode=0o600) as stream:
                text = json.dumps({"version": _VERSION, **asdict(self)}, indent=2)
                stream.write(f"{text}\n".encode())
        except OSError as error:
            raise GpudError(
                Code.STATE_UNUSABLE, f"{PATH} cannot be written: {error.strerror}"
            ) from error


def load(server: Server) -> Record:
    """Read the record; where there is none, nothing was made.

    Raises:
        GpudError: It cannot be read, or is no such record.
    """
    try:
        text = server.at(PATH).read_text()
        return _parse(json.loads(text))
    except FileNotFoundError:
        return Record()
    except PermissionError as error:
        raise GpudError(
            Code.STATE_UNUSABLE, f"{PATH} is for root to read", hint="sudo gpud setup"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"{PATH} is damaged, so what gpud setup made is not known: {error}",
            hint="put it back from a backup; without it, move it away and undo by hand",
        ) from error


def _parse(content: dict[str, Any]) -> Record:
    if content.pop("version") != _VERSION:
        raise ValueError("it is of another version")
    made = {part_of(key).key: Made(**one) for key, one in content.pop("made").items()}
    return Record(made=made, **content)
