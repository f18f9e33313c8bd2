"""What goes wrong on a GPU server, made to happen: cards that are held, resets that fail or hang."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from tests.lab import hardware
from tests.lab.hardware import Card
from tests.lab.machine import GpuServer

NVML_ANSWERS = "/etc/fake-nvml.txt"


def nvml_answers(users: dict[Card, int] | None = None) -> str:
    """What the stand-in for NVML is to tell: all cards, and which process uses which."""
    lines = ["driver_version 550.90.07"]
    for number, card in enumerate(hardware.CARDS):
        lines += [
            f"card {card.address}",
            f"while_driver {hardware.CARD_DRIVER}",
            f"ids {hardware.CARD_IDS}",
            f"subsystem {hardware.SUBSYSTEM_IDS}",
            "name NVIDIA GeForce RTX 4090",
            f"uuid GPU-00000000-0000-4000-8000-00000000000{number}",
            f"minor {number}",
            "memory_mib 24564",
            "memory_used_mib 1",
            "temperature_c 31",
        ]
        if users and card in users:
            lines.append(f"compute {users[card]}")
    return "\n".join([*lines, ""])


@asynccontextmanager
async def nvml_tells_of(server: GpuServer, card: Card, pid: int) -> AsyncIterator[None]:
    """NVML says that a process computes on a card."""
    await server.write(NVML_ANSWERS, nvml_answers({card: pid}))
    try:
        yield
    finally:
        await server.write(NVML_ANSWERS, nvml_answers())


@asynccontextmanager
async def held_open(server: GpuServer, *cards: Card) -> AsyncIterator[int]:
    """A process has the device nodes of cards open; its number.

    It is a process of gpud's own user: those of others nobody shows an ordinary user but NVML.
    """
    nodes = [
        (
            await server.run(f"basename /sys/bus/pci/devices/{card.address}/nvme/nvme*/nvme*n1")
        ).strip()
        for card in cards
    ]
    opened = " ".join(f"{number}</dev/{node}" for number, node in enumerate(nodes, start=3))
    as_gpud = "setpriv --reuid gpud --regid gpud --clear-groups"
    pid = int(await server.run(f"{as_gpud} sleep 3600 {opened} >/dev/null 2>&1 & echo $!"))
    try:
        yield pid
    finally:
        await server.run(f"kill {pid}")


@asynccontextmanager
async def reset_fails(server: GpuServer, card: Card) -> AsyncIterator[None]:
    """The kernel refuses to reset a card."""
    async with _instead_of_reset(server, card, "/dev/full"):
        yield


@asynccontextmanager
async def reset_hangs(
    server: GpuServer, card: Card
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """A reset of a card does not return, until what this gives is called."""
    fifo = f"/run/lab-{card.name}"
    await server.run(f"mkfifo -m 0666 {fifo}")

    async def let_go() -> None:
        await server.run(f"timeout 10 cat {fifo}")

    try:
        async with _instead_of_reset(server, card, fifo):
            yield let_go
    finally:
        await server.run(f"rm {fifo}")


async def reset_is_asked(server: GpuServer, card: Card, timeout_s: float = 60) -> None:
    """Wait until a reset of the card hangs, in the process that gpud has told to ask for it."""
    async with asyncio.timeout(timeout_s):
        while f"{card.address}/reset " not in await server.run("ps -C dd -o args= || true"):
            await asyncio.sleep(0.5)


@asynccontextmanager
async def _instead_of_reset(server: GpuServer, card: Card, file: str) -> AsyncIterator[None]:
    """Another file in place of the one through which the kernel is asked for a reset."""
    reset = f"$(realpath /sys/bus/pci/devices/{card.address})/reset"
    await server.run(f"mount --bind {file} {reset}")
    try:
        yield
    finally:
        # A card that was pulled out meanwhile has taken the mount with it.
        await server.run(f"mountpoint -q {reset} && umount {reset} || true")
