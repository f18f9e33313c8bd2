"""A configuration to look at a server with, and a way to read what the doctor says."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpud.config import Config
from gpud.doctor.check import Level, Verdict
from tests.unit.service import SETTINGS

REAL: dict[str, Any] = {"gpus": {}}
"""What makes a configuration one that sells real cards."""


def make_config(state_dir: Path = Path("/var/lib/gpud"), **changes: Any) -> Config:
    """A configuration that sells stand-ins; each keyword is a section that goes over the usual one."""
    return Config.model_validate({**SETTINGS, "state_dir": state_dir, **changes}, strict=False)


def offer(gpu_type: str = "h100_sxm", **changes: Any) -> dict[str, Any]:
    """An entry of ``offers``."""
    return {**SETTINGS["offers"][0], "gpu_type": gpu_type, **changes}


def only(verdicts: Iterable[Verdict]) -> tuple[Level, str, str]:
    """Level, words and mend of what should be a single verdict."""
    (one,) = verdicts
    return one.level, one.what, one.mend


def named(verdicts: Iterable[Verdict], name: str) -> tuple[Level, str, str]:
    """The same of the single verdict of that name."""
    return only(one for one in verdicts if one.name == name)


def level(verdicts: Iterable[Verdict], name: str) -> Level:
    """How bad it is."""
    return named(verdicts, name)[0]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number: int = listener.getsockname()[1]
        return number
