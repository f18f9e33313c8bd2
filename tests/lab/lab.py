"""The lab: the emulated server with gpud in it, and everybody around it."""

from __future__ import annotations

import asyncio
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.lab import hardware, images
from tests.lab.hardware import FOR_SALE, Card
from tests.lab.machine import CORES, GpuServer
from tests.machine.gpu_ai import CLIENT_ID, CLIENT_SECRET, GpuAi, TunnelEnd, gpu_ai
from tests.machine.processes import GPUD, Program, free_port

GPU_TYPE = "rtx_4090"
READY_TIMEOUT_S = 300
TERMINATED_TIMEOUT_S = 180
_START_TIMEOUT_S = 120
_ANSWER_TIMEOUT_S = 120
_HANG_SEEN_S = 90
_MOST_DEATHS = 3
"""More of them in one run are no accident any more."""

_CONFIG = "/etc/gpud/gpud.yaml"
_LAST_WORDS_S = 300
_LAST_WORDS = """
journalctl -u gpud -o cat --no-pager -n 60
dmesg | tail -n 30
top -b -n 1 | head -n 20
gpud gpus
virsh list --all
for guest in $(virsh list --name); do
  echo "--- $guest"
  for _ in 1 2; do  # a processor that is stuck is where it was
    virsh qemu-monitor-command --hmp "$guest" 'info registers' | grep 'IP='
  done
  tail -n 20 "/var/lib/gpud/console/${guest#gpud-}"*
done
true
"""


class Lab:
    """What the scenarios act on: GPU.ai outside, the operator and the hardware inside.

    Attributes:
        issuer_url: Where GPU.ai gets its tokens.
        tunnel: GPU.ai's end of the guests' tunnels.
        deaths: How often the emulated server has died of its emulation.

    Args:
        image: The server's image.
        payload: The disk with all that is installed in it.
        issuer_url: Where GPU.ai gets its tokens.
        tunnel: GPU.ai's end of the guests' tunnels.
        directory: Where this run keeps its files.
        bare: The server is without gpud, and somebody has turned its IOMMU off.
    """

    def __init__(
        self, image: Path, payload: Path, issuer_url: str, tunnel: TunnelEnd, directory: Path,
        *, bare: bool,
    ) -> None:  # fmt: skip
        self.tunnel = tunnel
        self.deaths = 0
        self._bare = bare
        self._image = image
        self._payload = payload
        self.issuer_url = issuer_url
        self._directory = directory
        self._server: GpuServer | None = None
        self._caller: GpuAi | None = None
        self._open = AsyncExitStack()

    @property
    def server(self) -> GpuServer:
        """The emulated GPU server."""
        assert self._server is not None
        return self._server

    @property
    def caller(self) -> GpuAi:
        """GPU.ai."""
        assert self._caller is not None
        return self._caller

    async def start(self) -> None:
        """Boot a new server, and unless it is to be bare, install gpud in it."""
        self._new_server()
        while not await self._survives(self._prepare):
            self._new_server()

    def _new_server(self) -> None:
        directory = self._directory / f"server-{self.deaths}"
        directory.mkdir()
        self._server = GpuServer(self._image, self._payload, directory, bare=self._bare)
        self._open.push_async_callback(self._server.stop)

    async def _prepare(self) -> None:
        await self.server.start()
        await self.server.run("mkdir /payload && mount -o ro /dev/vdb /payload")
        api_url = f"http://127.0.0.1:{self.server.api_port}"
        self._caller = await self._open.enter_async_context(gpu_ai(api_url, self.issuer_url))
        if not self._bare:
            await self.server.run("bash /payload/install.sh /payload", timeout_s=300)
            await self._caller.wait_for_offerings(timeout_s=120)

    async def stop(self) -> None:
        """Cut the server's power."""
        await self._open.aclose()

    async def survive(self, act: Callable[[], Awaitable[None]]) -> None:
        """Do something; do it again on a new server if this one dies of its emulation.

        QEMU's emulation of nested virtualisation has its flaws: now and then a page of the server's
        kernel is overwritten or a processor of it never comes back, and it panics or hangs. Nothing else
        that goes wrong is forgiven, nor is that when it goes on.
        """
        while not await self._survives(act):
            await self.start()

    async def _survives(self, act: Callable[[], Awaitable[None]]) -> bool:
        """Do something; whether the server is alive after it. One that is not is switched off."""
        doing = asyncio.ensure_future(act())
        watching = asyncio.ensure_future(self.server.watch())
        await asyncio.wait([doing, watching], return_when=asyncio.FIRST_COMPLETED)
        if doing.done() and doing.exception() is not None:
            # It may have failed for a server that hangs, and that takes some time to be seen.
            await asyncio.wait([watching], timeout=_HANG_SEEN_S)
        watching.cancel()
        if not self.server.dead:
            await doing
            return True
        doing.cancel()
        await asyncio.wait([doing])
        self.deaths += 1
        await self.stop()
        assert self.deaths <= _MOST_DEATHS, f"the server has died {self.deaths} times"
        return False

    async def try_order(self, script: str, gpu_count: int = 1) -> tuple[int, dict[str, Any]]:
        """Ask for an instance; the status of the answer, and the answer."""
        order = {
            "instance_id": f"lab-{uuid.uuid4().hex[:12]}",
            "gpu_type": GPU_TYPE,
            "gpu_count": gpu_count,
            "tier": "on_demand",
            "ssh_public_keys": [self.tunnel.customer_public_key],
            "startup_script": script,
        }
        return await self.caller.call("POST", "/v1/instances", order)

    async def order(self, script: str, gpu_count: int = 1) -> str:
        """Order an instance; its upstream id."""
        status, answer = await self.try_order(script, gpu_count)
        assert status == 201, answer
        upstream_id: str = answer["upstream_id"]
        return upstream_id

    async def running(self, *upstream_ids: str) -> None:
        """Wait until instances are running."""
        for upstream_id in upstream_ids:
            await self.caller.wait_for(upstream_id, "running", READY_TIMEOUT_S)

    async def delete(self, *upstream_ids: str) -> None:
        """Delete instances, and wait until everything of theirs is given back."""
        for upstream_id in upstream_ids:
            await self.caller.delete(upstream_id)
        for upstream_id in upstream_ids:
            await self.released(upstream_id)

    async def released(self, upstream_id: str, timeout_s: float = TERMINATED_TIMEOUT_S) -> None:
        """Wait until an instance has given everything back, whatever its status."""
        async with asyncio.timeout(timeout_s):
            while (await self.instance(upstream_id))["step"] != "ended":
                await asyncio.sleep(1)

    async def available(self, gpu_count: int = 1) -> int:
        """How many instances with this many GPUs are offered."""
        for offering in await self.caller.offerings():
            if offering["gpu_count"] == gpu_count:
                count: int = offering["available_count"]
                return count
        return 0

    async def offered(self, wanted: int, timeout_s: float = 60) -> None:
        """Wait until one-GPU instances are offered in just this number."""
        deadline = time.monotonic() + timeout_s
        while (now := await self.available()) != wanted:
            assert time.monotonic() < deadline, f"{now} are offered, not {wanted}"
            await asyncio.sleep(1)

    async def instance(self, upstream_id: str) -> dict[str, Any]:
        """An instance as the operator sees it."""
        for one in (await self._ask("/instances?all=1"))["instances"]:
            if one["upstream_id"] == upstream_id:
                found: dict[str, Any] = one
                return found
        raise AssertionError(f"gpud knows no {upstream_id}")

    async def cards_of(self, upstream_id: str) -> list[Card]:
        """The cards that an instance has."""
        addresses = (await self.instance(upstream_id))["gpus"]
        return [card for card in hardware.CARDS if card.address in addresses]

    async def gpus(self) -> dict[str, dict[str, Any]]:
        """All cards as the operator sees them, by their addresses."""
        return {gpu["address"]: gpu for gpu in (await self._ask("/gpus"))["gpus"]}

    async def gpu_state(self, card: Card, wanted: str, timeout_s: float = 60) -> dict[str, Any]:
        """Wait until a card is in a state."""
        deadline = time.monotonic() + timeout_s
        while (gpu := (await self.gpus())[card.address])["state"] != wanted:
            assert time.monotonic() < deadline, f"{gpu} is not {wanted}"
            await asyncio.sleep(1)
        return gpu

    async def quarantine(self, *cards: Card) -> None:
        """Keep cards from being sold, as the operator would."""
        for card in cards:
            await self._post(f"/gpus/{card.address}/quarantine", {"reason": "kept back by the lab"})

    async def release(self, *cards: Card) -> None:
        """End quarantines, as the operator would."""
        for card in cards:
            await self._post(f"/gpus/{card.address}/release", {})

    async def console(self, upstream_id: str, awaited: str, timeout_s: float = 60) -> str:
        """What a guest has printed, once that has something in it."""
        deadline = time.monotonic() + timeout_s
        while awaited not in (text := await self._get(f"/instances/{upstream_id}/console")):
            assert time.monotonic() < deadline, f"no {awaited!r} on the console:\n{text}"
            await asyncio.sleep(1)
        return text

    async def driver(self, address: str) -> str:
        """The driver that a function of the server has now; empty where it has none."""
        link = f"/sys/bus/pci/devices/{address}/driver"
        return Path((await self.server.run(f"readlink {link} || true")).strip()).name

    async def command(self, *arguments: str) -> str:
        """Run the ``gpud`` command the way an operator does."""
        return await self.server.run(" ".join(["gpud", *arguments]), timeout_s=120)

    async def complaint_about(self, upstream_id: str) -> str:
        """What gpud has logged of the failed step of an instance."""
        about = f"--grep 'step failed.*{upstream_id}|{upstream_id}.*step failed'"
        return await self.server.run(f"journalctl -u gpud -o cat --no-pager {about}")

    async def in_step(self, upstream_id: str, *wanted: str, timeout_s: float = 120) -> None:
        """Wait until an instance is in one of these steps."""
        deadline = time.monotonic() + timeout_s
        while (step := (await self.instance(upstream_id))["step"]) not in wanted:
            assert time.monotonic() < deadline, f"{upstream_id} is in {step}, not in {wanted}"
            await asyncio.sleep(0.2)

    async def drivers(self) -> dict[str, str]:
        """The drivers of all functions that are sold."""
        sold = [one for card in FOR_SALE for one in (card.address, card.companion) if one]
        return {address: await self.driver(address) for address in sold}

    async def interrupts(self, card: Card) -> int:
        """How many interrupts a card has sent to its guest, each through the IOMMU's remapping."""
        pattern = f"IR-PCI-MSI.*vfio-msix.*{card.address}"
        lines = await self.server.run(f"grep '{pattern}' /proc/interrupts")
        fields = [line.split()[1 : CORES + 1] for line in lines.splitlines()]
        return sum(int(count) for counts in fields for count in counts)

    async def back(self) -> None:
        """Wait until gpud answers after a boot of the server."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                await self.caller.offerings()
            except aiohttp.ClientError:
                assert time.monotonic() < deadline, "gpud does not answer"
                await asyncio.sleep(1)
            else:
                return

    async def sell_guest(self, image: str) -> None:
        """Let the coming orders have another guest image."""
        await self.server.run(f"sed -i 's/^  image: .*/  image: {image}/' {_CONFIG}")
        await self.restart()

    async def restart(self) -> None:
        """Restart the daemon."""
        await self.server.run("systemctl restart gpud", timeout_s=120)
        await self.caller.wait_for_offerings(timeout_s=120)

    async def clean_up(self) -> None:
        """Undo what a scenario has left: instances, missing cards, quarantines."""
        live = [one["upstream_id"] for one in (await self._ask("/instances"))["instances"]]
        await self.delete(*live)
        for card in list(self.server.missing):
            await self.server.put_in(card)
            await self.present(card)
        gpus = await self.gpus()
        await self.release(
            *(card for card in FOR_SALE if gpus[card.address]["state"] == "quarantined")
        )

    async def present(self, card: Card, timeout_s: float = 60) -> None:
        """Wait until the server's kernel has found a card, and its driver has it."""
        async with asyncio.timeout(timeout_s):
            for address in filter(None, (card.address, card.companion)):
                while not await self.driver(address):
                    await asyncio.sleep(1)

    async def last_words(self) -> str:
        """What helps to understand a failure: the service, the kernel, the cards, the guests."""
        return await self.server.run(_LAST_WORDS, timeout_s=_LAST_WORDS_S)

    async def _ask(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(await self._get(path))
        return answer

    async def _post(self, path: str, body: dict[str, str]) -> None:
        async with (
            self._operator() as session,
            session.post(f"http://gpud{path}", json=body) as response,
        ):
            assert response.status == 200, await response.text()

    async def _get(self, path: str) -> str:
        async with (
            self._operator() as session,
            session.get(f"http://gpud{path}") as response,
        ):
            assert response.status == 200, await response.text()
            return (await response.read()).decode(errors="replace")

    def _operator(self) -> aiohttp.ClientSession:
        connector = aiohttp.UnixConnector(str(self.server.admin_socket))
        timeout = aiohttp.ClientTimeout(total=_ANSWER_TIMEOUT_S)
        return aiohttp.ClientSession(connector=connector, timeout=timeout)


@asynccontextmanager
async def running_lab(directory: Path, cache: Path, *, bare: bool) -> AsyncIterator[Lab]:
    """Build what is missing, boot the server, and unless it is to be bare, install gpud in it."""
    image = await images.server_image(cache)
    guests = await images.guest_images(image, cache)
    issuer_url = f"http://127.0.0.1:{free_port()}"
    issuer = _issuer(issuer_url, directory)
    issuer.start()
    tunnel = TunnelEnd(directory / "gpu-ai")
    async with AsyncExitStack() as stack:
        stack.callback(issuer.stop)
        await issuer.listening(int(issuer_url.rsplit(":", 1)[1]))
        await tunnel.start()
        stack.callback(tunnel.sshd.stop)
        jwks = await _fetch(f"{issuer_url}/.well-known/jwks.json")
        payload = await images.payload(directory, _config(issuer_url), jwks, guests)
        lab = Lab(image, payload, issuer_url, tunnel, directory, bare=bare)
        stack.push_async_callback(lab.stop)
        await lab.start()
        yield lab


def scenario(act: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """A test that is repeated, once, if the emulated server dies of its emulation meanwhile."""

    @functools.wraps(act)
    async def survive(**given: Any) -> None:
        lab = next(one for one in given.values() if isinstance(one, Lab))
        await lab.survive(lambda: act(**given))

    return survive


def script(*lines: str) -> str:
    """A startup script for the small guest."""
    return "\n".join(["#!/bin/sh", *lines, ""])


def _config(issuer_url: str) -> str:
    config = yaml.safe_load((images.HERE / "gpud.yaml").read_text())
    config["auth"]["issuer"] = issuer_url
    return yaml.safe_dump(config, sort_keys=False)


def _issuer(url: str, directory: Path) -> Program:
    port = url.rsplit(":", 1)[1]
    argv: Sequence[str] = (
        *GPUD, "dev", "issuer", "--port", port, "--client-id", CLIENT_ID,
        "--client-secret", CLIENT_SECRET, "--audience", "gpud",
    )  # fmt: skip
    return Program("issuer", list(argv), directory / "issuer.log", {})


async def _fetch(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()
