"""``gpud image add``, ``check`` and ``seal`` on small real disks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from gpud.cli import images, main
from tests.unit.golden.conftest import FIT, LEFT_BEHIND, TOOLS, MakeDisk
from tests.unit.service import SETTINGS

pytestmark = pytest.mark.real_command(*TOOLS)

Gpud = Callable[..., Result]
UNSEALED = {**FIT, **LEFT_BEHIND}


@pytest.fixture
def gpud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpud:
    monkeypatch.setattr(images, "set_up_logging", lambda _: None)  # it would outlive the test
    config_file = tmp_path / "gpud.yaml"
    config_file.write_text(yaml.safe_dump({**SETTINGS, "state_dir": str(tmp_path / "state")}))
    environment = {"GPUD_CONFIG": str(config_file), "TMPDIR": str(tmp_path)}
    return lambda *words: CliRunner(env=environment).invoke(main, ["image", *map(str, words)])


def sealed(gpud: Gpud) -> list[bool]:
    return [image["sealed"] for image in json.loads(gpud("list", "--json").stdout)]


def test_a_fit_image_is_added_and_its_warnings_are_told(gpud: Gpud, make_disk: MakeDisk) -> None:
    without_console = {name: text for name, text in FIT.items() if name != "boot/grub/grub.cfg"}
    added = gpud("add", make_disk(without_console), "--name", "base")

    assert added.exit_code == 0, added.output
    assert "warning: serial console: the kernel does not talk" in added.stderr
    assert sealed(gpud) == [True]


def test_an_unsealed_image_is_refused_unless_that_is_said(gpud: Gpud, make_disk: MakeDisk) -> None:
    disk = make_disk(UNSEALED)

    refused = gpud("add", disk, "--name", "base")
    assert refused.exit_code == 1
    assert f"{disk} is not usable as a base image: it is not fit to be cloned" in refused.stderr
    assert "SSH host keys: /etc/ssh/ssh_host_ed25519_key" in refused.stderr
    assert "--unsealed" in refused.stderr
    assert sealed(gpud) == []

    assert gpud("add", disk, "--name", "base", "--unsealed").exit_code == 0
    assert sealed(gpud) == [False]


def test_check_says_how_bad_it_is_by_its_exit_status(gpud: Gpud, make_disk: MakeDisk) -> None:
    assert gpud("check", make_disk()).exit_code == 0
    found = gpud("check", make_disk({**FIT, "var/log/syslog": "SECRET"}), "--json")
    assert found.exit_code == 1
    (warning,) = [one for one in json.loads(found.stdout)["verdicts"] if one["level"] != "ok"]
    assert warning["name"] == "logs"
    assert gpud("check", make_disk(code=b""), "--firmware", "bios").exit_code == 2


def test_seal_writes_a_copy_or_in_place(gpud: Gpud, make_disk: MakeDisk, tmp_path: Path) -> None:
    disk, copy = make_disk(UNSEALED), tmp_path / "copy.raw"

    assert gpud("seal", disk, "--output", copy).exit_code == 0
    assert gpud("check", copy).exit_code == 0
    assert gpud("check", disk).exit_code == 2
    assert gpud("seal", disk, "--in-place").exit_code == 0
    assert gpud("check", disk).exit_code == 0


def test_seal_wants_to_know_where_to(gpud: Gpud, make_disk: MakeDisk, tmp_path: Path) -> None:
    disk = make_disk()
    for words in ([], ["--in-place", "--output", tmp_path / "copy"]):
        refused = gpud("seal", disk, *words)
        assert refused.exit_code == 2
        assert "either --in-place or --output" in refused.stderr


def test_seal_writes_nothing_where_it_cannot_help(
    gpud: Gpud, make_disk: MakeDisk, tmp_path: Path
) -> None:
    disk, copy = make_disk({"etc/passwd": ""}), tmp_path / "copy.raw"

    result = gpud("seal", disk, "--output", copy)

    assert result.exit_code == 2
    assert f"{copy}: not written" in result.stderr
    assert not copy.exists()
