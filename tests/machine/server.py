"""A real gpud for the demo and the machine tests: its issuer, its image, its daemon."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from tests.machine.gpu_ai import CLIENT_ID, CLIENT_SECRET
from tests.machine.processes import GPUD, Program, free_port, output_of, qemu_pid

DEMO_CONFIG = Path(__file__).parents[2] / "config" / "demo.yaml"


class GpudServer:
    """gpud, run as a program, in a state directory of its own.

    Args:
        state_dir: Its state directory.
        config_file: Its configuration.
        prefix: A command that runs gpud, as another user or with limits.
    """

    def __init__(
        self, state_dir: Path, config_file: Path = DEMO_CONFIG, prefix: Sequence[str] = ()
    ) -> None:
        self.state_dir = state_dir
        self.prefix = tuple(prefix)
        self.config_file = config_file
        self.config: dict[str, Any] = yaml.safe_load(config_file.read_text())
        self.env = {"STATE_DIRECTORY": str(state_dir), "GPUD_CONFIG": str(config_file)}
        self.issuer_url: str = self.config["auth"]["issuer"]
        self.port: int = self.config["server"]["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.daemon = Program("gpud", [], state_dir / "gpud.log", self.env)
        self.strike_at()
        issuer_port = self.issuer_url.rsplit(":", 1)[1]
        self.issuer = Program(
            "issuer",
            [*GPUD, "dev", "issuer", "--port", issuer_port, "--client-id", CLIENT_ID,
             "--client-secret", CLIENT_SECRET, "--audience", self.config["auth"]["audience"][0]],
            state_dir / "issuer.log", self.env,
        )  # fmt: skip

    @classmethod
    def with_own_ports(
        cls, state_dir: Path, prefix: Sequence[str] = (), **changes: Any
    ) -> GpudServer:
        """The demo's server, on free ports, with sections of its config changed."""
        config = yaml.safe_load(DEMO_CONFIG.read_text())
        issuer_url = f"http://127.0.0.1:{free_port()}"
        config["server"]["port"] = free_port()
        config["metrics"]["port"] = free_port()
        config["auth"]["issuer"] = issuer_url
        config["auth"]["jwks_url"] = f"{issuer_url}/.well-known/jwks.json"
        for section, values in changes.items():
            is_list = isinstance(values, list)
            config[section] = values if is_list else {**config.get(section, {}), **values}
        state_dir.mkdir(parents=True, exist_ok=True)
        config_file = state_dir / "gpud.yaml"
        config_file.write_text(yaml.safe_dump(config))
        return cls(state_dir, config_file, prefix)

    def strike_at(self, *points: str, hold: Path | None = None) -> None:
        """From its next start on, let the daemon kill itself at these points, or wait there.

        Args:
            points: As ``tests.machine.dying`` takes them; without any, gpud runs as it is.
            hold: A directory, for a daemon that is not to die but to wait; see :meth:`held`.
        """
        at = [argument for point in points for argument in ("--at", point)]
        where = [] if hold is None else ["--hold", str(hold)]
        program = [sys.executable, "-m", "tests.machine.dying", *at, *where] if points else GPUD
        self.daemon.argv = [*self.prefix, *program, "serve", "--config", str(self.config_file)]

    async def start(self, image: Path) -> None:
        """Add the guest image, start the issuer and the daemon."""
        # Others than the whole guest are no systems that gpud could look into.
        unsealed = [] if image == test_image() else ["--unsealed"]
        name = self.config["guest"]["image"]
        await self.gpud("image", "add", str(image), "--name", name, *unsealed)
        self.issuer.start()
        await self.issuer.listening(int(self.issuer_url.rsplit(":", 1)[1]))
        await self.start_daemon()

    async def start_daemon(self) -> None:
        self.daemon.start()
        await self.daemon.listening(self.port)

    def stop(self) -> None:
        self.daemon.stop()
        self.issuer.stop()

    async def gpud(self, *arguments: str) -> str:
        """Run the ``gpud`` command against this server."""
        env = [f"{key}={value}" for key, value in self.env.items()]
        return await output_of(*self.prefix, "env", *env, *GPUD, *arguments)

    async def findings(self) -> list[dict[str, Any]]:
        """What ``gpud check`` finds; it must be able to look."""
        env = [f"{key}={value}" for key, value in self.env.items()]
        script = '"$@" || [ $? -eq 1 ]'
        answer = await output_of(
            *self.prefix, "env", *env, "sh", "-c", script, "-", *GPUD, "check", "--json"
        )
        findings: list[dict[str, Any]] = json.loads(answer)["findings"]
        return findings

    def step(self, instance_id: str) -> str:
        """The step that an order's record has now; empty without a record."""
        rows = self.ask("SELECT step FROM instance WHERE instance_id = ?", instance_id)
        return rows[0][0] if rows else ""

    def ask(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask the record itself, whether the daemon runs or not."""
        path = self.state_dir / "state.sqlite"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as record:
            return record.execute(query, values).fetchall()

    def qemu(self, upstream_id: str) -> int | None:
        """The process of an instance's guest."""
        return qemu_pid(f"gpud-{upstream_id}")

    async def domains(self) -> list[str]:
        """Names of gpud's domains, as libvirt tells them."""
        uri = self.config["libvirt"]["uri"]
        names = await output_of("virsh", "-q", "-c", uri, "list", "--all", "--name")
        return [name for name in names.split() if name.startswith("gpud-")]

    async def remove_domains(self) -> None:
        """End the guests of this server, by the directories they were started from.

        A guest may end by itself meanwhile, and then libvirt refuses; one that is still there
        afterwards is a failure.
        """
        uri = self.config["libvirt"]["uri"]
        for directory in (self.state_dir / "instances").glob("i-*"):
            domain = f"gpud-{directory.name}"
            if domain not in await self.domains():
                continue
            try:
                await output_of("virsh", "-q", "-c", uri, "destroy", domain)
            except AssertionError:
                if domain in await self.domains():
                    raise

    async def remove_network(self) -> None:
        """Remove the libvirt network that the daemon has made, if its config has one."""
        network = self.config["network"]
        if network["mode"] == "network":
            for verb in ("net-destroy", "net-undefine"):
                await output_of("virsh", "-c", self.config["libvirt"]["uri"], verb, network["name"])

    def leftovers(self) -> list[str]:
        """Files that instances have left in the state directory."""
        places = (self.state_dir / "instances", self.state_dir / "console")
        return [str(path) for place in places for path in place.rglob("*")]

    def erase(self) -> None:
        shutil.rmtree(self.state_dir, ignore_errors=True)


def test_image() -> Path:
    """The guest image that the Makefile has built."""
    image = os.environ.get("GPUD_TEST_IMAGE", "")
    if not image or not Path(image).exists():
        raise FileNotFoundError("GPUD_TEST_IMAGE names no file; run this through make")
    return Path(image)
