"""The gpud command, against a real daemon's side door, real files and real images."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any, Self, TypeVar

import libvirt
import pytest
import structlog
import yaml
from click.testing import CliRunner, Result

from gpud import __version__, adminclient, listeners
from gpud.api import admin
from gpud.api.admin import Admin
from gpud.api.web import openapi_document
from gpud.audit import look
from gpud.cli import VERBS, judges, main, options
from gpud.config import Log
from gpud.configfile import parse_config
from gpud.errors import Code, GpudError, Problem
from gpud.guest.console import ConsoleLogs
from gpud.guest.image import ImageStore
from gpud.hypervisor import connection
from gpud.store import Store
from gpud.telemetry import set_up_logging
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
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
        self.reconciled = 0
        self.reloads: list[str] | GpudError = []
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

    async def _reconcile(self) -> None:
        self.reconciled += 1

    async def _reload(self) -> list[str]:
        if isinstance(self.reloads, GpudError):
            raise self.reloads
        return self.reloads

    async def _run(self) -> None:
        config = config_from(self._state_dir)
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with (
            running_service(config, self._images, Clock()) as self.service,
            AsyncExitStack() as stack,
        ):
            service = self.service
            overview = service.overview(self.consoles)
            door = Admin(
                service.store,
                service.desk,
                service.inventory,
                service.store.release,
                self.consoles,
                service.clock,
                reconcile=self._reconcile,
                reload=self._reload,
                overview=overview.server,
                in_full=overview.instance,
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
    assert [verb for verb in VERBS if verb not in shown] == []


def test_openapi_prints_the_document(gpud: Callable[..., Result]) -> None:
    result = gpud("openapi")
    assert result.exit_code == 0
    assert result.stdout_bytes == openapi_document()


def test_how_programs_end_is_heard_whoever_started_the_command(gpud: Callable[..., Result]) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert gpud("openapi").exit_code == 0
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)


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


@pytest.mark.usefixtures("daemon")
def test_the_service_can_be_asked_while_its_configuration_is_bad(
    gpud: Callable[..., Result], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = config_file.read_text()
    config_file.write_text(good.replace("3.49", "-1"))
    refused = gpud("offers")
    assert refused.exit_code == 1
    assert "price_per_gpu_hour" in refused.stderr

    monkeypatch.setattr(options, "_SERVICE_CONFIG", config_file)
    assert gpud("offers").exit_code == 1  # for the service does not run
    monkeypatch.setattr(options, "_SERVICE_SOCKET", parse_config(good).admin_socket_path)
    asked = gpud("offers", "--json")
    assert asked.exit_code == 0, asked.stderr
    assert json.loads(asked.stdout)[0]["price_per_hour"] == 3.49
    assert "goes by what it last read" in asked.stderr
    assert "price_per_gpu_hour" in asked.stderr
    assert "Warning" not in (reload := gpud("reload")).stderr
    assert reload.exit_code == 1


class Locked(type(Path())):  # type: ignore[misc]  # Python 3.11 has no other way
    """A path into a directory that its user may not look into."""

    def exists(self, **_options: bool) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))


def test_a_socket_that_may_not_be_looked_at_is_asked_all_the_same(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that who is not in the daemon's group is told that, and not of an error of Python's."""
    locked = Locked("/run/gpud/gpud.sock")
    monkeypatch.setattr(options, "_SERVICE_SOCKET", locked)
    assert options.socket_of(config_file) is locked


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
    assert result.exit_code == os.EX_CONFIG  # what systemd does not try again
    assert "/nowhere/tls.crt" in result.stderr
    assert "Traceback" not in result.output


def test_a_daemon_that_may_start_later_is_told_from_one_that_may_not(
    gpud: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "state").touch()  # a disk that is not mounted yet, say
    try:
        result = gpud("serve")
    finally:
        structlog.reset_defaults()
    assert (result.exit_code, str(tmp_path / "state") in result.stderr) == (1, True)


def test_systemd_is_told_what_is_wrong_with_the_configuration(
    gpud: Callable[..., Result], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text("site:\n  region:\n  datacenter_location: here\nauth: {}\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setitem(os.environ, "NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert gpud("serve").exit_code == os.EX_CONFIG
        told = systemd.recv(4096).decode()
    assert told.startswith(f"STATUS={config_file}: ")
    assert "site.region: not filled in" in told
    assert "\n" not in told


def test_without_a_file_the_daemons_own_configuration_is_checked(
    gpud: Callable[..., Result], config_file: Path
) -> None:
    assert gpud("config", "check").output == f"{config_file}: ok, 2 shapes on offer\n"


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


def test_events(gpud: Callable[..., Result], daemon: Daemon) -> None:
    assert (gpud("events").output, gpud("events", "--json").output) == ("", "[]\n")
    made = daemon.do(daemon.service.desk.order(order())).instance
    gpud("gpus", "quarantine", "ffffffff:01:00.0", "--reason", "fans rattle")
    lines = gpud("events").output.splitlines()
    assert lines[0].endswith(f"{made.upstream_id}  creating/lease_address  order accepted")
    assert lines[1].endswith("ffffffff:01:00.0  quarantined  fans rattle")
    assert gpud("events", "-n", "1").output.splitlines() == lines[1:]
    assert gpud("events", "--gpu", "ffffffff:01:00.0").output.splitlines() == lines[1:]
    assert gpud("events", "--instance", "gpuai-1").output.splitlines() == lines[:1]
    assert [one["why"] for one in json.loads(gpud("events", "--json").output)] == [
        "order accepted", "fans rattle",
    ]  # fmt: skip
    assert "no instance nobody" in gpud("events", "--instance", "nobody").stderr


def test_a_backup_of_the_running_daemon_and_its_way_back(
    gpud: Callable[..., Result], tmp_path: Path, images: ImageStore
) -> None:
    file, state_dir = tmp_path / "backup", tmp_path / "state"
    with Daemon(state_dir, images) as daemon:
        daemon.do(daemon.service.desk.order(order()))
        done = gpud("backup", str(file))
        assert (done.exit_code, done.output) == (0, f"{file}: the state as of now, verified\n")
        assert "is there already" in gpud("backup", str(file)).stderr
        refused = gpud("restore", str(file))
        assert (refused.exit_code, "another gpud is running" in refused.stderr) == (1, True)
    done = gpud("restore", str(file))
    assert done.exit_code == 0
    assert f"kept as {state_dir}/state.sqlite.before-restore-" in done.output
    assert "gpud check --repair" in done.output
    with Daemon(state_dir, images) as daemon:
        assert json.loads(gpud("instances", "--json").output)[0]["instance_id"] == "gpuai-1"
        assert json.loads(gpud("offers", "--json").output)[0]["available_count"] == 0
        assert "restored from a backup" in gpud("events").output


def test_a_restore_where_there_was_no_state_keeps_none(
    gpud: Callable[..., Result], tmp_path: Path, images: ImageStore
) -> None:
    file, state_dir = tmp_path / "backup", tmp_path / "state"
    with Daemon(state_dir, images):
        pass
    gpud("backup", str(file))
    (state_dir / "state.sqlite").unlink()
    done = gpud("restore", str(file))
    assert (done.exit_code, "kept as" in done.output) == (0, False)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C works, although whoever runs in the background was started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("before", [0, 1])
def test_events_are_followed_until_ctrl_c(
    gpud: Callable[..., Result], daemon: Daemon, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    for _ in range(before):
        daemon.do(daemon.service.store.note("before"))
    naps = count(1)

    def nap(_: float) -> None:
        match next(naps):
            case 2:
                daemon.do(daemon.service.store.note("then"))
            case 4:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(adminclient, "time", SimpleNamespace(sleep=nap))
    result = gpud("events", "--follow", "--json")
    assert result.exit_code == 0
    whys = [json.loads(line)["why"] for line in result.output.splitlines()]
    assert whys == ["before"] * before + ["then"]


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
    added = gpud("image", "add", str(source), "--name", "base", "--unsealed")
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
def test_an_image_is_read_whole_to_see_whether_it_is_intact(
    gpud: Callable[..., Result], tmp_path: Path
) -> None:
    source = tmp_path / "source.qcow2"
    make_qcow2(source)
    gpud("image", "add", str(source), "--name", "base", "--unsealed")
    (stored,) = (tmp_path / "state" / "images").glob("*.qcow2")
    result = gpud("image", "verify", "base")
    assert result.stdout == f"base: intact, {stored.stem.replace('-', ':')}\n"
    before = stored.stat()
    stored.chmod(0o600)
    with stored.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(stored, ns=(before.st_atime_ns, before.st_mtime_ns))
    result = gpud("image", "verify", "base")
    assert result.exit_code == 1
    assert "has changed (add it again" in result.stderr


@pytest.mark.real_command("qemu-img")
def test_an_image_with_another_checksum_is_refused(
    gpud: Callable[..., Result], tmp_path: Path
) -> None:
    source = tmp_path / "source.qcow2"
    make_qcow2(source)
    result = gpud("image", "add", str(source), "--name", "base", "--sha256", "0" * 64, "--unsealed")
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr
    assert gpud("image", "list", "--json").output == "[]\n"


def test_the_development_issuer_needs_a_port_that_is_free(gpud: Callable[..., Result]) -> None:
    assert gpud("dev", "issuer", "--port", "70000").exit_code == 2
    assert "never for a server that sells" in gpud("dev", "--help").output


# -- check -----------------------------------------------------------------------------------------


@pytest.fixture
def libvirtd(monkeypatch: pytest.MonkeyPatch) -> Iterator[LibvirtDaemon]:
    daemon = LibvirtDaemon()
    monkeypatch.setattr(libvirt, "open", daemon.open)
    monkeypatch.setattr(connection, "start_event_loop", lambda: None)
    monkeypatch.setattr(judges, "set_up_logging", _log_for_this_test)
    monkeypatch.setattr(look, "_BETWEEN_S", 0)
    yield daemon
    structlog.reset_defaults()


def _log_for_this_test(log: Log) -> None:
    set_up_logging(log)
    structlog.configure(cache_logger_on_first_use=False)  # it would outlive the standard error


def test_a_server_in_order_is_told_so(
    gpud: Callable[..., Result], daemon: Daemon, libvirtd: LibvirtDaemon
) -> None:
    assert daemon.service.store.live == {}
    assert libvirtd.guests == {}
    result = gpud("check")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "nothing is wrong\n", "")


def test_what_is_wrong_is_told_with_its_mend_and_repaired_when_asked_for(
    gpud: Callable[..., Result], daemon: Daemon, libvirtd: LibvirtDaemon
) -> None:
    daemon.consoles.append("i-00000000000000aa", b"login:")
    result = gpud("check")
    assert result.exit_code == 1
    first, mend = result.stdout.splitlines()
    assert first.startswith("leak: console of i-00000000000000aa ")
    assert mend == "  gpud check --repair"
    (finding,) = json.loads(gpud("check", "--json").stdout)["findings"]
    assert (finding["kind"], finding["repairable"]) == ("leak", True)
    assert gpud("check", "--repair").exit_code == 1  # this daemon's reconciler does nothing
    assert daemon.reconciled == 1
    assert "destroy" not in libvirtd.calls


def test_a_reload_tells_what_changed(daemon: Daemon, gpud: Callable[..., Result]) -> None:
    result = gpud("reload")
    assert (result.exit_code, result.output) == (0, "nothing has changed\n")
    daemon.reloads = ["stock.high_from: 4 -> 5", "auth.issuer"]
    result = gpud("reload")
    assert (result.exit_code, result.output) == (0, "stock.high_from: 4 -> 5\nauth.issuer\n")


def test_a_reload_that_is_refused_tells_every_problem(
    daemon: Daemon, gpud: Callable[..., Result], config_file: Path
) -> None:
    problems = [Problem("server.port", "is 1, would be 2", "restart gpud to change it"),
                Problem("state_dir", "is /a, would be /b")]  # fmt: skip
    daemon.reloads = GpudError(Code.CONFIG_INVALID, "refused", hint="put back", problems=problems)
    result = gpud("reload")
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "Error: refused (put back)",
        "  server.port: is 1, would be 2 (restart gpud to change it)",
        "  state_dir: is /a, would be /b",
    ]
    config_file.write_text("prices: {}")
    result = gpud("reload")
    assert result.exit_code == 1
    assert "prices: unknown key" in result.output


def test_a_check_works_without_a_daemon(
    gpud: Callable[..., Result], tmp_path: Path, libvirtd: LibvirtDaemon
) -> None:
    asyncio.run(_make_state(tmp_path / "state"))
    result = gpud("check", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"findings": []})
    assert "the daemon's answers were not compared: no daemon answers on" in result.stderr
    assert libvirtd.guests == {}
    repair = gpud("check", "--repair")
    assert (repair.exit_code, repair.stdout) == (2, "")


async def _make_state(state_dir: Path) -> None:
    await (await Store.open(state_dir)).close()


def test_a_check_that_cannot_look_says_why(
    gpud: Callable[..., Result], tmp_path: Path, libvirtd: LibvirtDaemon
) -> None:
    assert libvirtd.guests == {}
    result = gpud("check")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{tmp_path / 'state' / 'state.sqlite'} cannot be opened" in result.stderr
