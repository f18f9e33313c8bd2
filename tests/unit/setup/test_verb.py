"""``gpud setup`` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import yaml
from click.testing import CliRunner, Result

from gpud import cli
from gpud.cli import setup
from gpud.setup.bootloader import DROP_IN
from gpud.setup.change import fine
from gpud.setup.modules import FILE
from gpud.setup.server import Server
from tests.unit.doctor.parts import offer
from tests.unit.service import SETTINGS
from tests.unit.setup.host import Host
from tests.unit.setup.test_changes import gain_iommu, no_vfio

Gpud = Callable[..., Result]


@pytest.fixture
def gpud(host: Host, monkeypatch: pytest.MonkeyPatch) -> Gpud:
    settings = {**SETTINGS, "gpus": {}, "network": {}, "offers": [offer()]}
    host.write("/gpud.yaml", yaml.safe_dump({**settings, "state_dir": str(host.config.state_dir)}))
    monkeypatch.setattr(setup, "Server", lambda: host.server)
    monkeypatch.setattr(setup, "set_up_logging", lambda _: None)  # it would outlive the test
    runner = CliRunner(env={"GPUD_CONFIG": str(host.server.at("/gpud.yaml"))})
    return lambda *words, **more: runner.invoke(cli.main, ["setup", *words], **more)


def test_a_server_that_needs_nothing_says_so(gpud: Gpud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpud.setup.plan.image", lambda _: fine("image", "there"))
    result = gpud("--yes")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "this server needs nothing")


def test_what_is_left_for_hands_is_told_with_status_1(gpud: Gpud) -> None:
    result = gpud()
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (1, "to be done by hand: image")


def test_a_dry_run_shows_everything_and_changes_nothing(gpud: Gpud, host: Host) -> None:
    host.without_iommu()
    result = gpud("--dry-run", "--bind-early", "all")
    assert result.exit_code == 1
    for line in (
        "1. early binding: let nobody but vfio-pci have 0000:01:00.0, from boot on",
        "2. kernel arguments: boot Linux with intel_iommu=on iommu=pt",
        "   why: cards are given to guests, confined by the IOMMU",
        f"   writes {DROP_IN}:",
        "     | # Made by `gpud setup`; `gpud setup --undo` takes it back.",
        "   runs update-grub",
        "   in force with the next boot: the kernel takes intel_iommu=on iommu=pt at its start only",
        f"   undo: rm {DROP_IN} && update-grub, and a reboot",
        "nothing was changed (--dry-run)",
    ):
        assert line in result.stdout.splitlines()
    assert "   ! NVML does not see" in result.stdout
    assert not host.ran
    assert not host.server.exists("/var/lib/gpud-setup")


def test_anybody_may_look_and_only_root_may_change(gpud: Gpud, host: Host) -> None:
    object.__setattr__(host.server, "uid", 1000)
    assert gpud("--dry-run").exit_code == 1
    assert gpud("--json").exit_code == 1
    result = gpud("--yes")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "only root may change this server (sudo gpud setup" in result.stderr
    assert gpud("--undo", "--yes").exit_code == 2
    assert Server().uid >= 0


def test_two_at_once_do_not_change_one_server(gpud: Gpud, host: Host) -> None:
    no_vfio(host)
    with host.server.alone():
        for words in (("--yes",), ("--undo", "--yes")):
            result = gpud(*words)
            assert (result.exit_code, host.ran) == (2, [])
            assert "another gpud setup is changing this server (wait" in result.stderr
        assert gpud("--dry-run").exit_code == 1
    assert gpud("--yes").exit_code == 1
    assert host.ran


def test_no_is_an_answer(gpud: Gpud, host: Host) -> None:
    no_vfio(host)
    result = gpud(input="n\n")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (1, "nothing was changed")
    assert not host.server.exists(FILE)
    assert gpud(input="").exit_code == 1  # nobody is there to ask


def test_yes_is_one_too_and_every_act_is_told(gpud: Gpud, host: Host) -> None:
    no_vfio(host)
    result = gpud(input="y\n")
    assert f"writes {FILE}\nruns modprobe vfio-pci\n" in result.stdout
    assert result.exit_code == 1
    assert "writes" not in gpud("--yes").stdout
    host.units["libvirtd.service"] = "disabled"
    assert "   enables and starts libvirtd.service\n" in gpud("--dry-run").stdout


def test_a_needed_reboot_is_told_with_its_reason_and_status_3(gpud: Gpud, host: Host) -> None:
    host.without_iommu()
    result = gpud("--yes")
    assert result.exit_code == 3
    assert "reboot this server: kernel arguments: the kernel takes intel_iommu=on" in result.stdout
    assert gpud("--yes").exit_code == 3
    assert "Made, and in force with the next boot:" in gpud("--dry-run").stdout
    host.boot()
    gain_iommu(host)
    assert gpud("--yes").exit_code == 1


def test_the_plan_as_json_changes_nothing(gpud: Gpud, host: Host) -> None:
    no_vfio(host)
    result = gpud("--json", "--yes")
    told = json.loads(result.stdout)
    (item,) = [one for one in told["items"] if one["name"] == "kernel modules"]
    assert (result.exit_code, told["status"]) == (1, 1)
    assert item["state"] == "change"
    assert list(item["change"]["files"]) == [FILE]
    assert item["change"]["commands"] == ["modprobe vfio-pci"]
    assert not host.ran


def test_a_failure_is_told_with_status_2(gpud: Gpud, host: Host) -> None:
    no_vfio(host)
    host.broken.add("modprobe")
    result = gpud("--yes")
    assert (result.exit_code, "modprobe ended with status 1" in result.stderr) == (2, True)
    assert gpud("--yes", "--config", "/nonexistent.yaml").exit_code == 2
    assert gpud("--yes", "--bind-early", "nonsense").exit_code == 2


def test_what_still_is_to_be_made_after_making_is_told(gpud: Gpud, host: Host) -> None:
    """Somebody wrote grub.cfg by hand, and update-grub has undone that."""
    host.write("/etc/default/grub", 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n')
    host.write("/proc/cmdline", "quiet intel_iommu=on\n")
    result = gpud("--yes")
    assert result.exit_code == 1
    assert "to be made by gpud setup: kernel arguments" in result.stdout


# ---- undo


def test_where_nothing_was_made_there_is_nothing_to_undo(gpud: Gpud) -> None:
    result = gpud("--undo")
    assert (result.exit_code, "has made nothing here" in result.stdout) == (0, True)


def test_undo_shows_asks_and_takes_back(gpud: Gpud, host: Host) -> None:
    no_vfio(host)
    gpud("--yes")
    assert gpud("--undo", "--dry-run").exit_code == 1
    assert gpud("--undo", input="n\n").exit_code == 1
    assert host.server.exists(FILE)
    result = gpud("--undo", input="y\n")
    assert (result.exit_code, f"takes back file {FILE}" in result.stdout) == (0, True)
    assert not host.server.exists(FILE)
    assert not host.server.exists("/var/lib/gpud-setup")  # where it is noted what was made


def test_an_undoing_that_needs_a_reboot_says_so(gpud: Gpud, host: Host) -> None:
    host.without_iommu()
    gpud("--yes")
    result = gpud("--undo", "--yes")
    assert (result.exit_code, f"in force until a reboot: file {DROP_IN}" in result.stdout) == (
        3,
        True,
    )


def test_an_undoing_that_leaves_something_says_what(gpud: Gpud, host: Host) -> None:
    no_vfio(host)
    gpud("--yes")
    host.write(FILE, "mine\n")
    result = gpud("--undo", "--yes")
    assert (result.exit_code, f"left as it is: {FILE} was changed since" in result.stdout) == (
        1,
        True,
    )


@pytest.mark.parametrize("words", [["--bind-early", "all"], ["--json"]])
def test_undo_takes_back_everything_or_nothing(gpud: Gpud, words: list[str]) -> None:
    result = gpud("--undo", *words)
    assert (result.exit_code, "--undo takes back everything" in result.stderr) == (2, True)
