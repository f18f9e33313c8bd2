"""The whole look, over a fake kernel and libvirt's own test driver; and the verb itself."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import libvirt
import pytest
import yaml
from aiohttp import web
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gpud import cli, command, listeners, tables
from gpud.cli import judges
from gpud.config import Config
from gpud.configfile import load_config
from gpud.doctor.check import Group, Level, Verdict
from gpud.doctor.machine import Machine
from gpud.doctor.run import examine
from gpud.errors import Code, GpudError
from gpud.guest.image import ImageStore
from tests.unit.doctor.parts import free_port, level, named, offer
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.qemu_img import QemuImg, base_image
from tests.unit.service import SETTINGS

CAPABILITIES = """<capabilities><host><secmodel><model>dac</model>
<baselabel type='qemu'>+64055:+64055</baselabel></secmodel></host></capabilities>"""
MEMINFO = "MemTotal:       67108864 kB\n"


def settings(root: Path) -> dict[str, Any]:
    """A server that sells one H100."""
    return {
        **SETTINGS,
        "state_dir": str(root / "state"),
        "auth": {
            "issuer": "x",
            "audience": ["gpud"],
            "algorithms": ["ES256"],
            "key_files": [str(root / "key.pem")],
        },
        "server": {"listen": "127.0.0.1", "port": free_port()},
        "libvirt": {"uri": "test:///default"},
        "gpus": {"nvml": False},
        "offers": [
            offer(gpu_counts=[1], per_gpu={"cpu_cores": 1, "memory_gib": 1, "storage_gib": 1})
        ],
    }


async def _fit(_: Path) -> None:
    """Finds any image fit to be cloned."""


@pytest.fixture
async def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a server whose directory, image and keys are as they should be."""
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    state_dir.chmod(0o711)
    monkeypatch.setattr(command, "run", QemuImg().run)
    source = tmp_path / "source.qcow2"
    source.write_bytes(base_image())
    await ImageStore(state_dir / "images").add(source, "base", judge=_fit)
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(pem)
    path = tmp_path / "gpud.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path)))
    return path


@pytest.fixture
def config(config_file: Path) -> Config:
    return load_config(config_file)


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """A server with one H100 and a CPU that runs guests."""
    root = tmp_path / "server"
    root.mkdir()
    kernel = FakeKernel(root)
    kernel.add_function("0000:01:00.0", driver="nvidia", group=1)
    (kernel.proc / "cpuinfo").write_text("flags : fpu vmx\n")
    (kernel.proc / "stat").write_text("cpu  1 2 3\n" + "".join(f"cpu{n} 1\n" for n in range(8)))
    (kernel.proc / "meminfo").write_text(MEMINFO)
    (root / "dev").mkdir()
    (root / "dev/kvm").touch(mode=0o660)
    return kernel


@pytest.fixture
def machine(kernel: FakeKernel) -> Machine:
    return Machine(kernel.sysfs, kernel.proc, kernel.root / "dev", uid=0)


@pytest.fixture
def libvirt_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is opened is a test driver that tells who QEMU runs as."""
    real_open = libvirt.open

    class Told:
        def __init__(self) -> None:
            self._real = real_open("test:///default")

        def getCapabilities(self) -> str:  # noqa: N802 - libvirt's name
            return CAPABILITIES

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    monkeypatch.setattr(libvirt, "open", lambda _: Told())


async def look(config: Config, machine: Machine) -> list[Verdict]:
    return await examine(config, config.admin_socket_path, machine)


async def test_every_group_is_told_of_in_its_order(config: Config, machine: Machine) -> None:
    found = await look(config, machine)
    assert list(dict.fromkeys(one.group for one in found)) == list(Group)
    assert named(found, "cards")[:2] == (Level.OK, "1 x NVIDIA H100 SXM")
    assert named(found, "offers")[1] == "h100_sxm x 1: 1 of 1 cards can be sold"
    assert level(found, "guest.image") is Level.OK
    assert level(found, "keys") is Level.OK


async def test_a_look_leaves_everything_as_it_was(
    config: Config, machine: Machine, kernel: FakeKernel
) -> None:
    before = sorted(config.state_dir.rglob("*"))
    await look(config, machine)
    assert sorted(config.state_dir.rglob("*")) == before
    assert not kernel.writes


async def test_without_libvirt_all_else_is_looked_at(config: Config, machine: Machine) -> None:
    away = config.libvirt.model_copy(update={"uri": "test:///nonexistent"})
    found = await look(config.model_copy(update={"libvirt": away}), machine)
    assert level(found, "daemon") is Level.FAULT
    assert level(found, "/dev/kvm") is Level.OK
    assert level(found, "offers") is Level.OK


@pytest.mark.usefixtures("libvirt_says")
async def test_the_door_to_the_hypervisor_is_judged_for_whom_libvirt_names(
    config: Config, machine: Machine
) -> None:
    found = named(await look(config, machine), "/dev/kvm")
    assert found[0] is Level.FAULT
    assert "keeps QEMU's user" in found[1]


@pytest.mark.usefixtures("libvirt_says")
async def test_the_guests_of_a_session_run_as_who_asks(config: Config, machine: Machine) -> None:
    session = config.libvirt.model_copy(update={"uri": "qemu:///session"})
    found = await look(config.model_copy(update={"libvirt": session}), machine)
    assert named(found, "/dev/kvm")[1].endswith("QEMU's user root may use it")


async def test_a_capacity_that_cannot_be_read_is_told(
    config: Config, machine: Machine, kernel: FakeKernel
) -> None:
    (kernel.proc / "meminfo").unlink()
    found = await look(config, machine)
    assert level(found, "capacity") is Level.FAULT
    assert Group.OFFERS not in {one.group for one in found}


async def test_a_bus_that_cannot_be_read_is_told(
    config: Config, machine: Machine, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stuck(*_: object) -> list[bytes]:
        raise GpudError(Code.GPU_UNUSABLE, "not one answers", hint="see dmesg")

    monkeypatch.setattr(kernel, "read_many", stuck)
    found = await look(config, machine)
    assert named(found, "cards") == (Level.FAULT, "not one answers", "see dmesg")


async def test_a_daemon_that_answers_has_the_port(config: Config, machine: Machine) -> None:
    async def gpus(_: web.Request) -> web.Response:
        return web.json_response({"gpus": []})

    app = web.Application()
    app.router.add_get("/gpus", gpus)
    where = (config.server.listen, config.server.port)
    async with AsyncExitStack() as stack:
        await listeners.admin(stack, config.admin_socket_path, app)
        stack.enter_context(socket.create_server(where))
        found = await look(config, machine)
    assert named(found, "API port")[1].endswith("the daemon listens")


def test_a_file_of_procfs_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert Machine(proc=tmp_path).text("cpuinfo") == ""


# ---- the verb


@pytest.fixture
def gpud(
    config_file: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    monkeypatch.setattr(judges, "Machine", lambda: machine)
    monkeypatch.setattr(judges, "set_up_logging", lambda _: None)  # it would outlive the test
    environment = {"GPUD_CONFIG": str(config_file)}
    return lambda *words: CliRunner(env=environment).invoke(cli.main, ["doctor", *words])


def test_the_verb_shows_every_verdict_and_its_status(
    gpud: Callable[..., Result], config_file: Path, tmp_path: Path
) -> None:
    # Of OVMF libvirt 9's test driver says nothing, and libvirt 11's that there is none.
    bios = {**settings(tmp_path), "guest": {"firmware": "bios"}}
    config_file.write_text(yaml.safe_dump(bios))
    result = gpud()
    assert result.exit_code == 2  # the test driver emulates its guests
    lines = result.stdout.splitlines()
    assert lines[0] == "Host"
    assert any(line.startswith("  FAULT    guests ") for line in lines)
    assert any(line.strip().startswith("> see CPU and /dev/kvm above") for line in lines)
    assert lines[-1].startswith("1 fault, ")


def test_the_verb_gives_the_same_as_json(gpud: Callable[..., Result]) -> None:
    verdicts = json.loads(gpud("--json").stdout)["verdicts"]
    assert {
        "group": "Host",
        "name": "CPU",
        "level": "ok",
        "what": "has Intel VT-x",
        "mend": "",
    } in (verdicts)


def test_a_configuration_that_cannot_be_read_is_a_fault(gpud: Callable[..., Result]) -> None:
    result = gpud("--config", "/nonexistent.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot read /nonexistent.yaml" in result.stderr


def test_a_terminal_gets_signs_and_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    row = {"group": "Host", "name": "CPU", "what": "slow", "mend": "buy one"}
    tables.show_verdicts([{**row, "level": "fault"}], as_json=False)
    shown = capsys.readouterr().out
    assert "✗" in shown
    assert "→ buy one" in shown
    assert "\x1b[1;31m" in shown


def test_where_all_is_well_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"group": "Host", "name": "CPU", "level": "ok", "what": "has it", "mend": ""}
    tables.show_verdicts([row], as_json=False)
    assert capsys.readouterr().out.splitlines()[-1] == "all is well"
