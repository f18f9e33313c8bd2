"""Debian's nginx and Caddy in front of a real gpud, with the configurations that are documented."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.machine.gpu_ai import gpu_ai
from tests.machine.processes import Program, free_port
from tests.machine.server import GpudServer
from tests.unit.certificates import Tls

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NOWHERE = "test:///default"  # libvirt's own test driver: its guests are words
NAME = "localhost"
CLAIMED = "198.51.100.66"
CALLER = "127.0.0.2"


class Proxy:
    """A proxy that ends TLS for one gpud, with a certificate that only this test trusts."""

    def __init__(self, directory: Path, server: GpudServer) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"https://{NAME}:{self.port}"
        self.files = Tls(directory).write("proxy")
        self.trusting = ssl.create_default_context(cafile=str(self.files.certificate_file))
        self.backend = f"127.0.0.1:{server.port}"

    def nginx(self) -> Program:
        text = (EXAMPLES / "nginx.conf").read_text()
        for documented, here in (
            ("127.0.0.1:8443", self.backend),
            ("listen 443 ", f"listen 127.0.0.1:{self.port} "),
            (
                "/etc/letsencrypt/live/gpu.example.com/fullchain.pem",
                str(self.files.certificate_file),
            ),
            ("/etc/letsencrypt/live/gpu.example.com/privkey.pem", str(self.files.key_file)),
            ("gpu.example.com", NAME),
        ):
            assert documented in text, documented
            text = text.replace(documented, here)
        own = " ".join(f"{kind}_temp_path {self.directory}/{kind};" for kind in
                       ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))  # fmt: skip
        whole = (
            f"daemon off; error_log stderr; pid {self.directory}/nginx.pid; worker_processes 1;\n"
            f"events {{}}\nhttp {{ access_log off; {own}\n{text}\n}}\n"
        )
        file = self.directory / "nginx.conf"
        file.write_text(whole)
        nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin") or "nginx"
        argv = [nginx, "-p", str(self.directory), "-c", str(file)]
        return Program("nginx", argv, self.directory / "nginx.log", {})

    def caddy(self) -> Program:
        text = (EXAMPLES / "Caddyfile").read_text()
        site = "gpu.example.com {\n"
        assert text.count(site) == 1
        assert "127.0.0.1:8443 {" in text
        tls = f"\ttls {self.files.certificate_file} {self.files.key_file}\n\tbind 127.0.0.1\n"
        text = text.replace(site, f"{NAME}:{self.port} {{\n{tls}").replace(
            "127.0.0.1:8443 {", f"{self.backend} {{"
        )
        file = self.directory / "Caddyfile"
        file.write_text("{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + text)
        argv = ["caddy", "run", "--config", str(file), "--adapter", "caddyfile"]
        home = {"HOME": str(self.directory), "XDG_DATA_HOME": str(self.directory)}
        return Program("caddy", argv, self.directory / "caddy.log", home)


@asynccontextmanager
async def in_front(kind: str, state_dir: Path) -> AsyncIterator[tuple[GpudServer, Proxy]]:
    """A gpud that listens on loopback without TLS, and a proxy before it."""
    listener = {"listen": "127.0.0.1", "trusted_proxies": ["127.0.0.1/32"]}
    limits = {"limits": {"document_per_minute": 10}}
    server = GpudServer.with_own_ports(
        state_dir, libvirt={"uri": NOWHERE}, server={**listener, **limits}
    )
    proxy = Proxy(state_dir, server)
    program: Program = getattr(proxy, kind)()
    try:
        server.issuer.start()
        await server.issuer.listening(int(server.issuer_url.rsplit(":", 1)[1]))
        await server.start_daemon()
        program.start()
        await program.listening(proxy.port)
        yield server, proxy
    except BaseException:
        print(f"--- {kind} ends with\n{program.tail()}\n--- gpud ends with\n{server.daemon.tail()}")
        raise
    finally:
        program.stop()
        server.stop()
        server.erase()


@pytest.mark.parametrize("kind", ["nginx", "caddy"])
async def test_a_proxy_ends_tls_and_says_who_calls(kind: str, state_dir: Path) -> None:
    async with in_front(kind, state_dir) as (server, proxy):
        connector = aiohttp.TCPConnector(ssl=proxy.trusting, local_addr=(CALLER, 0))
        async with aiohttp.ClientSession(connector=connector) as session:

            async def ask(method: str, path: str, **more: Any) -> tuple[int, bytes]:
                async with session.request(method, f"{proxy.url}{path}", **more) as answer:
                    assert answer.headers["X-Request-Id"]
                    return answer.status, await answer.read()

            async with gpu_ai(server.url, server.issuer_url) as caller:
                token = {"Authorization": f"Bearer {caller.token}"}
            assert await ask("GET", "/v1/gpu/available", headers=token) == (
                200,
                b'{"offerings": []}',
            )

            lies = {"X-Forwarded-For": CLAIMED, "Forwarded": f"for={CLAIMED};proto=http",
                    "X-Request-Id": "lies"}  # fmt: skip
            status, body = await ask("GET", "/v1/gpu/available", headers=lies)
            assert (status, json.loads(body)["code"]) == (401, "missing_token")
            told = await logged(server, "lies")
            assert (told["client_address"], told["client_scheme"]) == (CALLER, "https")

            order = {"instance_id": "a", "gpu_type": "h100_sxm", "gpu_count": 8, "tier": "spot"}
            status, body = await ask("POST", "/v1/instances", json=order, headers=token)
            assert (status, json.loads(body)["code"]) == (422, "not_offered")
            large = BytesIO(json.dumps({**order, "startup_script": "#" * 2**20}).encode())
            status, body = await ask("POST", "/v1/instances", data=large, headers=token)
            assert (status, json.loads(body)["code"]) == (413, "payload_too_large")

            answers = [(await ask("GET", "/openapi.yaml", headers=lies))[0] for _ in range(11)]
            assert answers == [200] * 10 + [429], "the claimed address is not what is counted"


async def logged(server: GpudServer, request_id: str) -> dict[str, Any]:
    """The line of the daemon's log about a request."""
    async with asyncio.timeout(10):
        while True:
            for line in server.daemon.log.read_text().splitlines():
                if line.startswith("{") and f'"{request_id}"' in line:
                    event: dict[str, Any] = json.loads(line)
                    return event
            await asyncio.sleep(0.05)
