"""GPU.ai's side of an order: its client, and the far end of the tunnel that a guest opens."""

from __future__ import annotations

import asyncio
import getpass
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.machine.processes import Program, free_port, output_of

CLIENT_ID = "gpu-ai"
CLIENT_SECRET = "demo-secret"


class GpuAi:
    """Speaks the Supplier API the way GPU.ai does."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, issuer_url: str) -> None:
        self._session = session
        self._base_url = base_url
        self._issuer_url = issuer_url
        self.token = ""

    async def fetch_token(self) -> None:
        """OAuth2 client credentials (RFC 6749, section 4.4)."""
        form = {"grant_type": "client_credentials"}
        basic = aiohttp.encode_basic_auth(CLIENT_ID, CLIENT_SECRET)
        url = f"{self._issuer_url}/oauth2/token"
        async with self._session.post(url, data=form, headers={"Authorization": basic}) as response:
            answer = await response.json()
            assert response.status == 200, answer
            self.token = answer["access_token"]

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request; the status and the JSON answer."""
        headers = {"Authorization": f"Bearer {self.token}"}
        url = self._base_url + path
        async with self._session.request(method, url, headers=headers, json=body) as response:
            if response.status == 204:
                return 204, None
            return response.status, await response.json(content_type=None)

    async def offerings(self) -> list[dict[str, Any]]:
        status, answer = await self.call("GET", "/v1/gpu/available")
        assert status == 200, answer
        offerings: list[dict[str, Any]] = answer["offerings"]
        return offerings

    async def wait_for_offerings(self, timeout_s: float = 30) -> list[dict[str, Any]]:
        """What is for sale, once gpud has found libvirt."""
        deadline = time.monotonic() + timeout_s
        while not (offerings := await self.offerings()):
            assert time.monotonic() < deadline, "nothing is offered"
            await asyncio.sleep(0.6)  # server.limits: 120 a minute
        return offerings

    async def order(self, **body: object) -> dict[str, Any]:
        status, answer = await self.call("POST", "/v1/instances", body)
        assert status == 201, answer
        accepted: dict[str, Any] = answer
        return accepted

    async def show(self, either_id: str) -> dict[str, Any]:
        status, answer = await self.call("GET", f"/v1/instances/{either_id}")
        assert status == 200, answer
        instance: dict[str, Any] = answer
        return instance

    async def delete(self, either_id: str) -> None:
        status, answer = await self.call("DELETE", f"/v1/instances/{either_id}")
        assert status == 204, answer

    async def wait_for(
        self,
        either_id: str,
        wanted: str,
        timeout_s: float,
        on_change: Callable[[str], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Poll until the instance has the wanted status; another final one is a failure."""
        deadline, seen = time.monotonic() + timeout_s, ""
        while True:
            instance = await self.show(either_id)
            if instance["status"] != seen:
                seen = instance["status"]
                on_change(seen)
            if seen == wanted:
                return instance
            if seen in {"error", "terminated"}:
                raise AssertionError(f"{either_id} is {instance}, not {wanted}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{either_id} is {seen}, not {wanted}, after {timeout_s} s")
            await asyncio.sleep(0.5)


@asynccontextmanager
async def gpu_ai(base_url: str, issuer_url: str) -> AsyncIterator[GpuAi]:
    """GPU.ai with a fresh token."""
    async with aiohttp.ClientSession() as session:
        caller = GpuAi(session, base_url, issuer_url)
        await caller.fetch_token()
        yield caller


class TunnelEnd:
    """The sshd that guests open their reverse tunnels to, and logins back through them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.port = free_port()
        self.sshd = Program(
            "sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", str(directory / "sshd_config")],
            directory / "sshd.log", {},
        )  # fmt: skip

    async def start(self) -> None:
        """Make keys for the host, the tunnel and the customer, and start sshd."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        for name in ("host", "tunnel", "customer"):
            (self._directory / name).unlink(missing_ok=True)
            await output_of("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{name}@gpu.ai",
                            "-f", str(self._directory / name))  # fmt: skip
        (self._directory / "tunnel_keys").write_text(self._read("tunnel.pub"))
        (self._directory / "sshd_config").write_text(f"""\
ListenAddress 127.0.0.1:{self.port}
HostKey {self._directory}/host
PidFile none
AuthorizedKeysFile {self._directory}/tunnel_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
AllowTcpForwarding remote
""")
        self.sshd.start()
        await self.sshd.listening(self.port)

    @property
    def customer_public_key(self) -> str:
        return self._read("customer.pub").strip()

    @property
    def customer_key_file(self) -> Path:
        return self._directory / "customer"

    def startup_script(self, tunnel_port: int, *lines: str) -> str:
        """A script like GPU.ai's: it opens a tunnel, in the foreground, and opens it again."""
        target = f"{getpass.getuser()}@10.0.2.2"
        extra = "\n".join(lines)
        return f"""\
#!/bin/bash
echo "startup script: pid $$ as $(id -un) on $(hostname)"
{extra}
umask 077
cat >/run/tunnel_key <<'END_OF_KEY'
{self._read("tunnel")}END_OF_KEY
while true; do
  ssh -N -i /run/tunnel_key -p {self.port} -R 127.0.0.1:{tunnel_port}:127.0.0.1:22 \\
    -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \\
    -o ExitOnForwardFailure=yes -o ServerAliveInterval=15 -o ConnectTimeout=20 {target}
  echo "tunnel ended with $?; opening it again"
  sleep 1
done
"""

    async def log_in(
        self, tunnel_port: int, user: str, command: str, timeout_s: float = 120
    ) -> str:
        """Run a command in the guest, through its tunnel, with the customer's key."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return await output_of(*self.login_command(tunnel_port, user), command)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(1)

    def login_command(self, tunnel_port: int, user: str) -> list[str]:
        return ["ssh", "-i", str(self.customer_key_file), "-p", str(tunnel_port),
                "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                "-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes",
                "-o", "ConnectTimeout=45", f"{user}@127.0.0.1"]  # fmt: skip

    def _read(self, name: str) -> str:
        return (self._directory / name).read_text()


def default_state(name: str) -> Path:
    """Where a throw-away gpud keeps its state: where root's QEMU, which is another user, gets to."""
    if os.geteuid() == 0:
        return Path("/var/lib") / name
    return Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local/state")) / name
