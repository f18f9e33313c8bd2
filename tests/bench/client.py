"""A caller that waits for one answer at a time, over one connection: what it costs is seen by itself."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

from tests.machine.server import GpudServer

_IDLE_S = 30
"""After which a connection is opened anew; the daemon closes one that is idle for 75 s."""


class Client:
    """GPU.ai's requests, timed."""

    def __init__(self, server: GpudServer, token: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        self._headers = {"Authorization": f"Bearer {token}"}
        self._used_at = 0.0
        self.took_s = 0.0

    def ask(self, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes]:
        """One request; the status and the answer. ``took_s`` says how long it took."""
        if time.perf_counter() - self._used_at > _IDLE_S:
            self._connection.close()
            self._connection.connect()
        began = time.perf_counter()
        self._connection.request(method, path, body, self._headers)
        response = self._connection.getresponse()
        answer = response.read()
        self._used_at = time.perf_counter()
        self.took_s = self._used_at - began
        return response.status, answer

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request and its answer in JSON."""
        status, answer = self.ask(path, method, None if body is None else json.dumps(body).encode())
        return status, json.loads(answer) if answer else None

    def order(self, instance_id: str, **body: object) -> dict[str, Any]:
        """Order one GPU."""
        wanted = {"gpu_type": "h100_sxm", "gpu_count": 1, "tier": "on_demand", **body}
        status, answer = self.call("POST", "/v1/instances", {"instance_id": instance_id, **wanted})
        assert status == 201, answer
        accepted: dict[str, Any] = answer
        return accepted

    def delete(self, either_id: str) -> None:
        status, answer = self.call("DELETE", f"/v1/instances/{either_id}")
        assert status == 204, answer

    def status(self, either_id: str) -> str:
        status, answer = self.call("GET", f"/v1/instances/{either_id}")
        assert status == 200, answer
        return str(answer["status"])

    def available(self) -> int:
        """How many single GPUs could be ordered now."""
        status, answer = self.call("GET", "/v1/gpu/available")
        assert status == 200, answer
        return max((one["available_count"] for one in answer["offerings"]), default=0)

    def wait_terminated(self, either_id: str, available: int, timeout_s: float = 120) -> None:
        """Wait until it is gone and ``available`` GPUs are for sale again."""
        deadline = time.monotonic() + timeout_s
        while (now := (self.status(either_id), self.available())) != ("terminated", available):
            if time.monotonic() > deadline:
                raise AssertionError(f"{either_id} was not released: {now}")
            time.sleep(0.005)

    def close(self) -> None:
        self._connection.close()
