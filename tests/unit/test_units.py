"""What systemd is told of gpud, judged by systemd's own tools."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "systemd/gpud.service"


@pytest.mark.real_command("systemd-analyze")
def test_the_service_is_exposed_by_no_more_than_2() -> None:
    threshold = "--threshold=20"  # tenths
    judged = analyze("security", "--offline=true", threshold, str(UNIT))
    assert judged.returncode == 0, judged.stdout


@pytest.mark.real_command("systemd-analyze")
def test_systemd_knows_every_key_of_the_unit(tmp_path: Path) -> None:
    (tmp_path / UNIT.name).write_text(UNIT.read_text().replace("/usr/bin/gpud", "/usr/bin/env"))
    judged = analyze("verify", "--man=no", str(tmp_path / UNIT.name))
    assert (judged.returncode, judged.stdout, judged.stderr) == (0, "", "")


@pytest.mark.real_command("systemd-analyze")
def test_a_key_that_systemd_does_not_know_is_seen(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/usr/bin/gpud", "/usr/bin/env")
    (tmp_path / UNIT.name).write_text(text.replace("WatchdogSec", "WatchDogSec"))
    assert "WatchDogSec" in analyze("verify", "--man=no", str(tmp_path / UNIT.name)).stderr


def test_a_daemon_whose_configuration_is_wrong_is_not_started_again() -> None:
    assert setting("RestartPreventExitStatus") == str(os.EX_CONFIG)
    assert setting("Restart") == "on-failure"
    assert setting("StartLimitIntervalSec") == "0"  # everything else is tried again for ever


def test_what_tells_of_who_holds_a_card_stays_visible() -> None:
    text = UNIT.read_text()
    for hides in ("ProtectProc", "ProcSubset", "PrivateDevices", "PrivateUsers"):
        assert not re.search(rf"^{hides}=", text, re.MULTILINE)


def setting(key: str) -> str:
    (value,) = re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return str(value)


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *words], capture_output=True, text=True, check=False, timeout=30
    )
