"""A real gpud for the demo and the machine tests: its issuer, its image, its daemon."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.machine.gpu_ai import CLIENT_ID, CLIENT_SECRET
from tests.machine.processes import GPUD, Program, free_port, output_of

DEMO_CONFIG = Path(__file__).parents[2] / "config" / "demo.yaml"


class GpudServer:
    """gpud, run as a program, in a state directory of its own."""

    def __init__(self, state_dir: Path, config_file: Path = DEMO_CONFIG) -> None:
        self.state_dir = state_dir
        self.config_file = config_file
        self.config: dict[str, Any] = yaml.safe_load(config_file.read_text())
        self.env = {"STATE_DIRECTORY": str(state_dir), "GPUD_CONFIG": str(config_file)}
        self.issuer_url: str = self.config["auth"]["issuer"]
        self.port: int = self.config["server"]["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.daemon = Program(
            "gpud", [*GPUD, "serve", "--config", str(config_file)], state_dir / "gpud.log", self.env
        )
        issuer_port = self.issuer_url.rsplit(":", 1)[1]
        self.issuer = Program(
            "issuer",
            [*GPUD, "dev", "issuer", "--port", issuer_port, "--client-id", CLIENT_ID,
             "--client-secret", CLIENT_SECRET, "--audience", self.config["auth"]["audience"][0]],
            state_dir / "issuer.log", self.env,
        )  # fmt: skip

    @classmethod
    def with_own_ports(cls, state_dir: Path, **changes: dict[str, Any]) -> GpudServer:
        """The demo's server, on free ports, with sections of its config changed."""
        config = yaml.safe_load(DEMO_CONFIG.read_text())
        issuer_url = f"http://127.0.0.1:{free_port()}"
        config["server"]["port"] = free_port()
        config["metrics"]["port"] = free_port()
        config["auth"]["issuer"] = issuer_url
        config["auth"]["jwks_url"] = f"{issuer_url}/.well-known/jwks.json"
        for section, values in changes.items():
            config[section] = {**config.get(section, {}), **values}
        state_dir.mkdir(parents=True, exist_ok=True)
        config_file = state_dir / "gpud.yaml"
        config_file.write_text(yaml.safe_dump(config))
        return cls(state_dir, config_file)

    async def start(self, image: Path) -> None:
        """Add the guest image, start the issuer and the daemon."""
        await self.gpud("image", "add", str(image), "--name", self.config["guest"]["image"])
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
        return await output_of("env", *env, *GPUD, *arguments)

    async def domains(self) -> list[str]:
        """Names of gpud's domains, as libvirt tells them."""
        uri = self.config["libvirt"]["uri"]
        names = await output_of("virsh", "-q", "-c", uri, "list", "--all", "--name")
        return [name for name in names.split() if name.startswith("gpud-")]

    async def remove_domains(self) -> None:
        """End the guests of this server, by the directories they were started from."""
        uri = self.config["libvirt"]["uri"]
        for directory in (self.state_dir / "instances").glob("i-*"):
            if f"gpud-{directory.name}" in await self.domains():
                await output_of("virsh", "-q", "-c", uri, "destroy", f"gpud-{directory.name}")

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
