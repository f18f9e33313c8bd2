"""The daemon that is measured: a program of its own, on the real libvirt or on libvirt's test driver."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.client import Client
from tests.bench.core import Bench
from tests.bench.history import ended_instances
from tests.machine.gpu_ai import gpu_ai
from tests.machine.server import GpudServer

SERVER_CORE = 0
CLIENT_CORE = (os.cpu_count() or 1) - 1
_CPU_LIST = Path("/sys/devices/system/node/node0/cpulist")
_CORES_LENT = 64

_COUNTED_NOT_REACHED = {
    f"{kind}_per_minute": 1_000_000
    for kind in ("offerings", "orders", "statuses", "terminations", "document", "refused_tokens")
}
"""So that a request costs what it costs when it is counted."""

TEST_DRIVER = {"uri": "test:///default", "domain_type": "qemu"}
"""libvirt's own stand-in for a hypervisor, inside the daemon: guests that need no processor."""


@dataclass
class Running:
    """A daemon that serves, and a caller of it."""

    server: GpudServer
    client: Client
    token: str

    @property
    def pid(self) -> int:
        return self.server.daemon.pid


def on_core(core: int) -> list[str]:
    """Keeps a program on one core."""
    return ["taskset", "-c", str(core)]


def with_cores_lent(directory: Path) -> list[str]:
    """Lets a daemon see more cores than there are, so that more guests fit than the machine has cores.

    Only its own view is changed: the file that it counts them in, in a mount namespace of its own.
    """
    if (os.cpu_count() or 1) >= _CORES_LENT or os.geteuid() != 0 or not _CPU_LIST.exists():
        return []
    lent = directory / "cpulist"
    lent.write_text(f"0-{_CORES_LENT - 1}\n")
    script = f'mount --bind "{lent}" {_CPU_LIST} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "-"]


def empty_image(bench: Bench) -> Path:
    """A disk with nothing in it, for guests that never boot."""
    path = bench.directory / "empty.qcow2"
    if not path.exists():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "16M"], check=True)
    return path


def settings(gpus: int, *, memory_gib: float, cores: int = 1) -> dict[str, Any]:
    """Sections of the config for so many stand-ins, sold one by one."""
    offer = {
        "gpu_type": "h100_sxm",
        "gpu_counts": [1],
        "per_gpu": {"cpu_cores": cores, "memory_gib": memory_gib, "storage_gib": 4},
        "price_per_gpu_hour": {"on_demand": 3.49},
    }
    return {
        "server": {"limits": _COUNTED_NOT_REACHED},
        "offers": [offer],
        "gpus": {"stand_ins": [{"gpu_type": "h100_sxm", "count": gpus}]},
    }


@asynccontextmanager
async def running(
    bench: Bench,
    name: str,
    image: Path,
    *,
    gpus: int = 1,
    memory_gib: float = 0.25,
    cores: int = 1,
    ended: int = 0,
    prefix: Sequence[str] = (),
    **changes: Any,
) -> AsyncIterator[Running]:
    """A daemon up and selling; afterwards it and all of its guests are gone.

    Args:
        bench: The run.
        name: Of its state directory.
        image: What its guests boot.
        gpus: Stand-ins.
        memory_gib: Of each guest.
        cores: Of each guest.
        ended: Instances that its record knows of from former days.
        prefix: A command that runs it, such as :func:`on_core`.
        changes: Sections of its config.
    """
    directory = bench.directory / name
    directory.mkdir()
    directory.chmod(0o711)
    if ended:
        ended_instances(bench, ended, directory)
    wrapped = [*with_cores_lent(directory), *prefix]
    changes = {**settings(gpus, memory_gib=memory_gib, cores=cores), **changes}
    server = GpudServer.with_own_ports(directory, wrapped, **changes)
    try:
        await server.start(image)
        async with gpu_ai(server.url, server.issuer_url) as caller:
            await caller.wait_for_offerings()
            client = Client(server, caller.token)
            yield Running(server, client, caller.token)
            client.close()
    finally:
        server.stop()
        if server.config["libvirt"]["uri"] != TEST_DRIVER["uri"]:
            await server.remove_domains()
        server.erase()
