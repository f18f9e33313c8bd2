"""A server that is set up already, for tests to take things away from."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpud import command
from tests.unit.setup.host import Host


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    found = Host(tmp_path)
    monkeypatch.setattr(command, "run", found.run)
    return found
