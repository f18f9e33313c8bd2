"""The gpud command, against a real daemon's side door, real files and real images."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self, TypeVar

import pytest
import structlog
import yaml
from click.testing import CliRunner, Result

from gpud import __version__, listeners
from gpud.api import admin
from gpud.api.admin import Admin
from gpud.api.web import openapi_document
from gpud.cli import main
from gpud.guest.console import ConsoleLogs
from gpud.guest.image import ImageStore
from tests.unit.service import (
    SETTINGS,
    Clock,
    Service,
    config_from,
    images,
    make_ended,
    make_qcow2,
    order,
    running_service,
)

__all__ = ["images"]  # a fixture

T = TypeVar("T")


class Daemon:
    """The side door of a daemon, on a thread of its own."""

    def __init__(self, state_dir: Path, images: ImageStore) -> None:
        self.consoles = ConsoleLogs(state_dir / "console", 64 * 1024)
        self.service: Service
        self._state_dir = state_dir
        self._images = images
        self._loop: asyncio.AbstractEventLoop
        self._ready = Event()
        self._stop: asyncio.Event
        self._thread = Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on the daemon's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _run(self) -> None:
        config = config_from(self._state_dir)
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with (
            running_service(config, self._images, Clock()) as self.service,
            AsyncExitStack() as stack,
        ):
            service = self.service
            door = Admin(
                service.store,
                service.desk,
                service.inventory,
                service.store.release,
                self.consoles,
                service.clock,
            )
            await listeners.admin(stack, config.admin_socket_path, door.build_app())
            self._ready.set()
            await self._stop.wait()


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    path = tmp_path / "gpud.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "state_dir": str(tmp_path / "state")}))
    return path


@pytest.fixture
def gpud(config_file: Path) -> Callable[..., Result]:
    """Type a command; the config file is known to it."""
    environment = {"GPUD_CONFIG": str(config_file), "COLUMNS": "200"}

    def typed(*words: str) -> Result:
        return CliRunner(env=environment).invoke(main, words)

    return typed


@pytest.fixture
def daemon(tmp_path: Path, images: ImageStore, config_file: Path) -> Iterator[Daemon]:
    assert config_file.exists()
    with Daemon(tmp_path / "state", images) as daemon:
        yield daemon


def test_version_and_help(gpud: Callable[..., Result]) -> None:
    assert gpud("--version").output == f"gpud, version {__version__}\n"
    shown = gpud("-h").output
    assert all(verb in shown for verb in main.commands)


def test_openapi_prints_the_document(gpud: Callable[..., Result]) -> None:
    result = gpud("openapi")
    assert result.exit_code == 0
    assert result.stdout_bytes == openapi_document()


def test_a_good_config_is_ok(gpud: Callable[..., Result], config_file: Path) -> None:
    result = gpud("config", "check", str(config_file))
    assert (result.exit_code, result.output) == (0, f"{config_file}: ok, 2 shapes on offer\n")


def test_every_problem_of_a_bad_config_is_shown(
    gpud: Callable[..., Result], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("site: {region: 1}\nservr: {}\nlog: {level: loud}\nlog: {}\n")
    result = gpud("config", "check", str(bad))
    assert result.exit_code == 1
    for place in ("auth", "site.region", "site.datacenter_location", "servr", "line 4, log"):
        assert place in result.stderr
    assert "Traceback" not in result.output


def test_a_config_that_is_not_there_is_named(gpud: Callable[..., Result]) -> None:
    result = gpud("config", "check", "/nowhere/gpud.yaml")
    assert result.exit_code == 1
    assert "/nowhere/gpud.yaml" in result.stderr


def test_a_daemon_that_cannot_start_says_why(
    gpud: Callable[..., Result], config_file: Path
) -> None:
    settings = yaml.safe_load(config_file.read_text())
    tls = {"certificate_file": "/nowhere/tls.crt", "key_file": "/nowhere/tls.key"}
    config_file.write_text(yaml.safe_dump({**settings, "server": {"tls": tls}}))
    try:
        result = gpud("serve")
    finally:
        structlog.reset_defaults()
    assert result.exit_code == 1
    assert "/nowhere/tls.crt" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "words", [["instances"], ["offers"], ["console", "x"], ["console", "-f", "x"]], ids=" ".join
)
def test_a_daemon_that_is_down_is_named(
    gpud: Callable[..., Result], tmp_path: Path, words: list[str]
) -> None:
    result = gpud(*words)
    assert result.exit_code == 1
    assert f"no daemon answers on {tmp_path / 'state' / 'gpud.sock'}" in result.stderr
    assert "systemctl status gpud" in result.stderr


def test_instances(gpud: Callable[..., Result], daemon: Daemon) -> None:
    assert gpud("instances").output == "no instances\n"
    made = daemon.do(daemon.service.desk.order(order())).instance
    shown = gpud("instances")
    assert shown.exit_code == 0
    assert made.upstream_id in shown.output
    assert json.loads(gpud("instances", "--json").output)[0]["instance_id"] == "gpuai-1"
    daemon.do(make_ended(daemon.service, made.upstream_id))
    assert gpud("instances", "--json").output == "[]\n"
    assert "terminated" in gpud("instances", "--all").output


def test_offers(gpud: Callable[..., Result], daemon: Daemon) -> None:
    daemon.do(daemon.service.desk.order(order()))
    shown = gpud("offers").output.splitlines()
    assert shown[1].split() == ["h100_sxm", "1", "on_demand", "4", "16", "100", "3.49", "Low", "1"]
    assert "sold out" in shown[3]
    assert len(json.loads(gpud("offers", "--json").output)) == 4


def test_gpus_and_what_an_operator_does_to_one(gpud: Callable[..., Result], daemon: Daemon) -> None:
    assert daemon.service.config.gpus.stand_ins
    first = gpud("gpus").output.splitlines()[1]
    assert first.startswith("ffffffff:00:00.0")
    assert "available" in first
    shown = gpud("gpus", "quarantine", "ffffffff:00:00.0", "--reason", "fans [rattle]").output
    assert "fans [rattle]" in shown
    assert json.loads(gpud("gpus", "--json").output)[0]["state"] == "quarantined"
    assert "after a look at it: gpud gpus release ffffffff:00:00.0" in gpud("gpus").output
    assert "available" in gpud("gpus", "release", "ffffffff:00:00.0").output
    refused = gpud("gpus", "confirm", "0000:41:00.0")
    assert (refused.exit_code, "no GPU at 0000:41:00.0" in refused.output) == (1, True)


@pytest.mark.real_command(Path(sys.executable).name)
def test_this_server_is_recorded_as_data_for_a_test(
    gpud: Callable[..., Result], tmp_path: Path
) -> None:
    result = gpud("dev", "capture-host", str(tmp_path / "here"))
    assert str(tmp_path / "here/host.yaml") in result.output.split()
    assert yaml.safe_load((tmp_path / "here/host.yaml").read_text())["nodes"] is not None


def test_a_console(gpud: Callable[..., Result], daemon: Daemon) -> None:
    made = daemon.do(daemon.service.desk.order(order())).instance
    daemon.consoles.append(made.upstream_id, b"boot\xff\x1b[0m\n")
    for either_id in (made.upstream_id, "gpuai-1"):
        result = gpud("console", either_id)
        assert (result.exit_code, result.stdout_bytes) == (0, b"boot\xff\x1b[0m\n")


@pytest.mark.parametrize("unknown", ["none", "../../etc/passwd", "a?b#c", "ü\n"])
def test_a_console_of_nobody(gpud: Callable[..., Result], daemon: Daemon, unknown: str) -> None:
    assert daemon.service.store.live == {}
    result = gpud("console", unknown)
    assert result.exit_code == 1
    assert f"there is no instance {unknown}" in result.stderr


def test_a_console_is_followed_to_the_end(
    gpud: Callable[..., Result], daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "_FOLLOW_EVERY_S", 0.005)
    made = daemon.do(daemon.service.desk.order(order())).instance

    async def boot_and_end() -> None:
        for line in (b"one\n", b"two\n"):
            await asyncio.sleep(0.02)
            daemon.consoles.append(made.upstream_id, line)
        await asyncio.sleep(0.02)
        await make_ended(daemon.service, made.upstream_id)

    guest = asyncio.run_coroutine_threadsafe(boot_and_end(), daemon._loop)
    result = gpud("console", "--follow", "gpuai-1")
    guest.result(10)
    assert (result.exit_code, result.stdout_bytes) == (0, b"one\ntwo\n")


@pytest.mark.real_command("qemu-img")
def test_images_are_added_listed_and_removed(gpud: Callable[..., Result], tmp_path: Path) -> None:
    source = tmp_path / "source.qcow2"
    make_qcow2(source)
    assert gpud("image", "list").output == "no images; `gpud image add` adds one\n"
    added = gpud("image", "add", str(source), "--name", "base")
    assert added.exit_code == 0, added.output
    (image,) = json.loads(gpud("image", "list", "--json").output)
    assert added.stdout.endswith(f"{image['digest']}\n")
    assert (image["name"], image["in_use_by"]) == ("base", 0)
    assert "base" in gpud("image", "list").output
    stored = tmp_path / "state" / "images" / f"{image['digest'].replace(':', '-')}.qcow2"
    os.link(stored, tmp_path / "an-instance-uses-it")
    refused = gpud("image", "rm", "base")
    assert refused.exit_code == 1
    assert "in use by 1 instance" in refused.stderr
    (tmp_path / "an-instance-uses-it").unlink()
    assert gpud("image", "rm", "base").output == "base: removed\n"
    assert gpud("image", "list", "--json").output == "[]\n"


@pytest.mark.real_command("qemu-img")
def test_an_image_with_another_checksum_is_refused(
    gpud: Callable[..., Result], tmp_path: Path
) -> None:
    source = tmp_path / "source.qcow2"
    make_qcow2(source)
    result = gpud("image", "add", str(source), "--name", "base", "--sha256", "0" * 64)
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr
    assert gpud("image", "list", "--json").output == "[]\n"


def test_the_development_issuer_needs_a_port_that_is_free(gpud: Callable[..., Result]) -> None:
    assert gpud("dev", "issuer", "--port", "70000").exit_code == 2
    assert "never for a server that sells" in gpud("dev", "--help").output
