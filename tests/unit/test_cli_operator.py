"""What an operator types: drains, one instance and its end, the server at a glance, and watching."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from gpud.cli import main, showing
from gpud.screens import live
from tests.unit.lifecycle.conftest import _quiet_log
from tests.unit.service import make_failed, make_running, order
from tests.unit.test_cli import Daemon, config_file, daemon, gpud, images

__all__ = ["_quiet_log", "config_file", "daemon", "gpud", "images"]  # fixtures

FIRST, SECOND = "ffffffff:00:00.0", "ffffffff:01:00.0"
Gpud = Callable[..., Result]


def new(daemon: Daemon, instance_id: str = "gpuai-1") -> str:
    return daemon.do(daemon.service.desk.order(order(instance_id))).instance.upstream_id


# -- drains ----------------------------------------------------------------------------------------


def test_a_card_is_drained_and_undrained(gpud: Gpud, daemon: Daemon) -> None:
    shown = gpud("drain", "--gpu", FIRST, "--reason", "new [fan]").output
    assert "drained" in shown.splitlines()[1]
    assert shown.endswith(f": new [fan] (undrain: gpud undrain --gpu {FIRST})\n")
    assert json.loads(gpud("gpus", "--json").output)[0]["state"] == "drained"
    assert len(daemon.service.store.drains) == 1
    shown = gpud("undrain", "--gpu", FIRST).output
    assert "available" in shown
    assert "was not drained" not in shown
    assert f"GPU {FIRST} was not drained" in gpud("undrain", "--gpu", FIRST).output


def test_the_server_is_drained_and_what_stays_is_told(gpud: Gpud, daemon: Daemon) -> None:
    said = gpud("drain", "--all").output
    assert said == "the server takes no new orders; no instance is on it\n"
    assert gpud("undrain", "--all").output == "the server is no longer drained\n"
    assert gpud("undrain", "--all").output == "it was not drained\n"
    new(daemon)
    said = gpud("drain", "--all").output
    assert said == "the server takes no new orders; 1 instance stays: gpud instances\n"
    gpud("undrain", "--all")
    new(daemon, "gpuai-2")
    gpud("drain", "--gpu", FIRST)
    assert "; 2 instances stay: gpud instances" in gpud("drain", "--all").output
    assert gpud("undrain", "--all").output.splitlines() == [
        "the server is no longer drained",
        f"GPU {FIRST} stays drained: gpud undrain --gpu {FIRST}",
    ]


@pytest.mark.parametrize("verb", ["drain", "undrain"])
@pytest.mark.parametrize("words", [[], ["--gpu", FIRST, "--all"]], ids=["nothing", "both"])
def test_what_is_to_be_drained_must_be_said(
    gpud: Gpud, daemon: Daemon, verb: str, words: list[str]
) -> None:
    result = gpud(verb, *words)
    assert (result.exit_code, "either --gpu ADDRESS or --all" in result.stderr) == (2, True)
    assert daemon.service.store.drains == {}


def test_a_card_that_is_not_here_is_not_drained(gpud: Gpud, daemon: Daemon) -> None:
    result = gpud("drain", "--gpu", "41:00.0")
    assert (result.exit_code, "no GPU at 0000:41:00.0" in result.stderr) == (1, True)
    assert daemon.service.store.drains == {}


# -- one instance ----------------------------------------------------------------------------------


def test_an_instance_is_shown_by_its_id_alone(gpud: Gpud, daemon: Daemon) -> None:
    upstream_id = new(daemon)
    shown = gpud("instances", upstream_id)
    assert shown.exit_code == 0
    assert upstream_id in shown.output
    assert "order accepted" in shown.output
    assert gpud("instances", "gpuai-1").output == shown.output
    assert gpud("instances", "show", "gpuai-1").output == shown.output
    told = json.loads(gpud("instances", "gpuai-1", "--json").output)
    assert (told["upstream_id"], told["cost_so_far"]) == (upstream_id, 0)


def test_an_instance_that_nobody_knows_is_said_so(gpud: Gpud, daemon: Daemon) -> None:
    assert daemon.service.store.live == {}
    result = gpud("instances", "lst")
    assert result.exit_code == 1
    assert "there is no instance lst (`gpud instances --all` lists them)" in result.stderr


def test_what_is_given_before_the_id_holds_for_it(
    gpud: Gpud, daemon: Daemon, config_file: Path, tmp_path: Path
) -> None:
    upstream_id = new(daemon)
    assert json.loads(gpud("instances", "--json", "gpuai-1").output)["upstream_id"] == upstream_id
    missing = str(tmp_path / "missing.yaml")
    for words in (["instances", "--config", missing, "gpuai-1"],
                  ["gpus", "--config", missing, "release", FIRST]):  # fmt: skip
        result = gpud(*words)
        assert (result.exit_code, missing in result.stderr) == (1, True)
    nearer = ["instances", "--config", missing, "show", "gpuai-1", "--config", str(config_file)]
    assert gpud(*nearer).exit_code == 0


# -- its end ---------------------------------------------------------------------------------------


def test_an_instance_is_ended_when_that_is_confirmed(
    gpud: Gpud, daemon: Daemon, config_file: Path
) -> None:
    upstream_id = new(daemon)
    daemon.do(make_running(daemon.service, upstream_id))
    daemon.service.clock.advance(7265)
    stop = ["instances", "stop", "gpuai-1", "--reason", "abuse"]
    environment = {"GPUD_CONFIG": str(config_file)}
    for answer in ("n\n", ""):
        refused = CliRunner(env=environment).invoke(main, stop, input=answer)
        assert refused.exit_code == 1
        assert daemon.service.store.live[upstream_id].delete_requested_at is None
    done = CliRunner(env=environment).invoke(main, stop, input="y\n")
    assert f"{upstream_id} (gpuai-1, h100_sxm x1, running for 2 h 01 min) ends for" in done.output
    assert f"{upstream_id} is stopping; gpud instances {upstream_id} shows" in done.output
    assert daemon.service.store.live[upstream_id].delete_requested_at is not None
    assert "the operator asked to terminate it: abuse" in gpud("events", "-n", "1").output


def test_scripts_are_not_asked(gpud: Gpud, daemon: Daemon) -> None:
    upstream_id = new(daemon)
    done = gpud("instances", "stop", upstream_id, "--reason", "abuse", "--yes")
    assert (done.exit_code, "is stopping" in done.output) == (0, True)


def test_an_instance_that_is_not_up_yet_is_asked_about_by_its_status(
    gpud: Gpud, daemon: Daemon
) -> None:
    new(daemon)
    assert "h100_sxm x1, creating)" in gpud("instances", "stop", "gpuai-1", "--reason", "x").output


def test_what_has_failed_has_not_to_be_ended(gpud: Gpud, daemon: Daemon) -> None:
    upstream_id = new(daemon)
    daemon.do(make_failed(daemon.service, upstream_id, "no boot"))
    done = gpud("instances", "stop", "gpuai-1", "--reason", "it failed")
    assert done.exit_code == 0
    assert done.output == f"{upstream_id} is error already, nothing was changed\n"


def test_an_end_needs_a_reason(gpud: Gpud, daemon: Daemon) -> None:
    upstream_id = new(daemon)
    result = gpud("instances", "stop", "gpuai-1", "--yes")
    assert (result.exit_code, "--reason" in result.stderr) == (2, True)
    assert daemon.service.store.live[upstream_id].delete_requested_at is None


# -- the server at a glance ------------------------------------------------------------------------


def test_why_something_is_not_on_offer_is_below_the_offers(gpud: Gpud, daemon: Daemon) -> None:
    new(daemon)
    lines = gpud("offers").output.splitlines()
    assert lines[-2:] == ["h100_sxm x2", "  2 GPUs needed, 1 of 2 free: 1 in use"]
    assert json.loads(gpud("offers", "--json").output)[3]["why_not"].startswith("2 GPUs needed")


def test_status(gpud: Gpud, daemon: Daemon) -> None:
    new(daemon)
    shown = gpud("status").output
    for words in ("ready", "1 available, 1 in use", "1 creating", "0.00 USD", "order accepted"):
        assert words in shown
    assert json.loads(gpud("status", "--json").output)["instances"]["creating"] == 1


@pytest.mark.parametrize(
    "words",
    [["status"], ["instances", "i-1"], ["instances", "stop", "i-1", "--reason", "x", "--yes"],
     ["drain", "--all"], ["undrain", "--gpu", FIRST], ["gpus"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_daemon_that_is_down_is_named(gpud: Gpud, words: list[str]) -> None:
    result = gpud(*words)
    assert result.exit_code == 1
    assert "no daemon answers on" in result.stderr
    assert "systemctl status gpud" in result.stderr


# -- watching --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["status"], ["gpus"], ["instances"], ["instances", "i-1"], ["offers"]], ids=" ".join
)
def test_only_a_terminal_can_be_drawn_anew(gpud: Gpud, words: list[str]) -> None:
    result = gpud(*words, "--watch")
    assert (result.exit_code, "--watch needs a terminal" in result.stderr) == (2, True)


class Screen:
    """What is asked for and drawn, instead of a loop that never ends."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def watch(self, draw: Callable[[], Any], _: Console) -> None:
        console = Console(width=80)
        with console.capture() as captured:
            console.print(draw())
        self.drawn.append(captured.get())


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen()
    monkeypatch.setattr(live, "watch", screen.watch)
    monkeypatch.setattr(showing, "on_a_terminal", lambda: True)
    return screen


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["status"], "Last events"),
        (["gpus"], FIRST),
        (["instances"], "creating"),
        (["instances", "gpuai-1"], "Ordered as"),
        (["instances", "--watch", "gpuai-1"], "Ordered as"),
        (["offers"], "sold out"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_can_be_watched(
    gpud: Gpud, daemon: Daemon, screen: Screen, words: list[str], shown: str
) -> None:
    new(daemon)
    watching = words if "--watch" in words else [*words, "--watch"]
    assert gpud(*watching).exit_code == 0
    assert shown in screen.drawn[0]


def test_programs_do_not_watch(gpud: Gpud, screen: Screen) -> None:
    result = gpud("status", "--watch", "--json")
    assert (result.exit_code, "--json for programs" in result.stderr) == (2, True)
    assert screen.drawn == []


def test_standard_output_is_no_terminal_here() -> None:
    assert showing.on_a_terminal() is sys.stdout.isatty()
    assert isinstance(main, click.Group)
