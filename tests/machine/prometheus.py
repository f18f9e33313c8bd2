"""Debian's Prometheus, which scrapes one gpud."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.machine.processes import Program, free_port

CONFIG = Path(__file__).parents[2] / "config"
ALERTS = CONFIG / "prometheus-alerts.yaml"


class Prometheus:
    """A Prometheus that scrapes one gpud, every second, with gpud's own alerts."""

    def __init__(self, directory: Path, target: str) -> None:
        self.port = free_port()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [{"job_name": "gpud", "static_configs": [{"targets": [target]}]}],
        }
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        self.program = Program(
            "prometheus",
            ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={directory / 'tsdb'}",
             f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn"],
            directory / "prometheus.log", {},
        )  # fmt: skip

    async def ready(self) -> None:
        """Wait until it answers queries."""
        await self.program.listening(self.port)
        async with asyncio.timeout(30), aiohttp.ClientSession() as session:
            while (await session.get(f"http://127.0.0.1:{self.port}/-/ready")).status != 200:
                await asyncio.sleep(0.1)

    async def ask(self, path: str, **query: str) -> Any:
        """Its HTTP API's answer; a query that it does not understand is a failure."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}"
        async with aiohttp.ClientSession() as session, session.get(url, params=query) as answer:
            told = await answer.json()
        assert told["status"] == "success", (query, told)
        return told["data"]

    async def value(self, query: str) -> float | None:
        """The one number of a query; None while there is none."""
        found = (await self.ask("query", query=query))["result"]
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else None

    async def until(self, query: str, wanted: float, timeout_s: float = 30) -> None:
        """Wait until a query gives a number."""
        deadline = time.monotonic() + timeout_s
        while (found := await self.value(query)) != pytest.approx(wanted):
            assert time.monotonic() < deadline, f"{query} is {found}, not {wanted}"
            await asyncio.sleep(0.2)
