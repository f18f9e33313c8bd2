"""Calls the API as GPU.ai does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import Any

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from tests.unit.contract import Answer, check_request, check_response

ORDER = {"gpu_type": "h100_sxm", "gpu_count": 1, "tier": "on_demand"}


class Client:
    """Calls the API as GPU.ai does; what comes back is always held against the OpenAPI document."""

    def __init__(self, session: aiohttp.ClientSession, url: URL, token: str) -> None:
        self.session = session
        self.url = url
        self.token = token

    async def ask(
        self,
        method: str,
        path: str,
        *,
        data: bytes = b"",
        headers: dict[str, str] | None = None,
        token: str | None = "",
    ) -> Answer:
        """Send a request; ``token`` None sends none, and "" sends the good one."""
        sent = {} if token is None else {"Authorization": f"Bearer {token or self.token}"}
        url = URL(f"{self.url.origin()}{path}", encoded=True)
        async with self.session.request(
            method, url, data=BytesIO(data) if data else None, headers={**sent, **(headers or {})}
        ) as response:
            answer = Answer(response.status, response.headers, await response.read())
        check_response(method, path, answer)
        return answer

    async def send(self, request: bytes) -> Answer:
        """Send bytes that need not be HTTP, and read the answer to them."""
        assert self.url.port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", self.url.port)
        writer.write(request)
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = (line.partition(": ") for line in lines if line)
        headers = CIMultiDict((name, value) for name, _, value in fields)
        body = await reader.readexactly(int(headers.get("Content-Length", "0")))
        writer.close()
        await writer.wait_closed()
        return Answer(int(status.split(" ")[1]), headers, body)

    def head(self, method: str, path: str, **headers: str) -> bytes:
        """The head of a request, for :meth:`send`."""
        lines = [f"{method} {path} HTTP/1.1", "Host: gpud", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, f"Authorization: Bearer {self.token}", "", ""]).encode()

    async def get(self, path: str, **more: Any) -> Answer:
        return await self.ask("GET", path, **more)

    async def delete(self, path: str, **more: Any) -> Answer:
        return await self.ask("DELETE", path, **more)

    async def post(self, body: Any, **more: Any) -> Answer:
        """Send an order: bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **more.pop("headers", {})}
        answer = await self.ask("POST", "/v1/instances", data=data, headers=headers, **more)
        if answer.status == 201 and not isinstance(body, bytes):
            check_request("POST", "/v1/instances", body)
        return answer

    async def order(self, instance_id: str = "gpuai-1", **fields: Any) -> Answer:
        """Order one H100, or what ``fields`` say."""
        return await self.post({**ORDER, "instance_id": instance_id, **fields})


OpenClient = Callable[..., Awaitable[Client]]
