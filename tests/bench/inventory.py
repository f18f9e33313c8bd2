"""A look at the whole host, as the daemon takes one every 15 s."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import yaml

from gpud.configfile import parse_config
from gpud.host import capacity, iommu, livebus
from gpud.host.sysfs import Sysfs
from gpud.host.vfio import Handover
from gpud.inventory import Inventory
from gpud.store import Store
from tests.bench.core import Bench, Side
from tests.bench.row import Row, Target
from tests.unit.fakes import recorded_host

_RECORDED = "rtx4090-x8"
_LINEAR = Target(2)
_CONFIG = """
auth: {issuer: x, audience: [a], jwks_url: "https://a/b"}
site: {region: US, datacenter_location: x}
network: {mode: user}
"""


async def measure(bench: Bench) -> AsyncIterator[Row]:
    async with AsyncExitStack() as stack:
        sides = [await look(bench, stack, boards) for boards in (1, 2)]
        eight, sixteen = await bench.take_turns("inventory", bench.rounds(40, 10), *sides)
    yield Row("inventory of 16 recorded GPUs", "of 8", "ms", sixteen, eight, _LINEAR)


async def look(bench: Bench, stack: AsyncExitStack, boards: int) -> Side:
    """Look at a recorded server, so many of them in one box; in ms."""
    root = bench.directory / f"host-{boards}"
    host = recorded_host.unfold_directory(_several(boards, root / "recorded"), root)
    store = await Store.open(root / "state")
    stack.push_async_callback(store.close)
    sysfs = Sysfs(host.sysfs)
    view = Inventory(
        parse_config(_CONFIG),
        partial(capacity.measure, root, proc=host.proc, sysfs=host.sysfs),
        partial(livebus.read, sysfs),
        None,
        store,
        read_iommu=partial(iommu.facts, host.sysfs, host.proc),
        handover=Handover(sysfs),
    )

    async def once() -> float:
        began = time.perf_counter()
        await view.refresh()
        assert len(view.cards) == 8 * boards
        return (time.perf_counter() - began) * 1000

    return once


def _several(boards: int, directory: Path) -> Path:
    """The recording, so many times over: each further one in a PCI domain of its own."""
    recorded = recorded_host.HOSTS / _RECORDED / "host.yaml"
    host = yaml.load(recorded.read_text(), yaml.CSafeLoader)
    one = yaml.safe_dump(host["functions"])
    host["functions"] = [
        function
        for board in range(boards)
        for function in yaml.load(_in_domain(one, board), yaml.CSafeLoader)
    ]
    directory.mkdir(parents=True)
    (directory / "host.yaml").write_text(yaml.safe_dump(host))
    return directory


def _in_domain(functions: str, board: int) -> str:
    moved = re.sub(r"\b0000:(?=[0-9a-f]{2}:)", f"{board:04x}:", functions)
    return re.sub(r"group: (\d+)", lambda found: f"group: {int(found[1]) + 1000 * board}", moved)
