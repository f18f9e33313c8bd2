"""``make bench``: what gpud costs, in ratios to peers and floors that are measured in the same run."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import structlog
from rich.console import Console

from tests.bench import (
    boot,
    clone,
    guests,
    idle,
    inventory,
    memory,
    orders,
    polling,
    report,
    startup,
    tokens,
)
from tests.bench.core import Bench, OutOfTime
from tests.bench.row import Row
from tests.machine.gpu_ai import default_state

FAMILIES: dict[str, Callable[[Bench], AsyncIterator[Row]]] = {
    "tokens": tokens.measure,
    "inventory": inventory.measure,
    "clone": clone.measure,
    "startup": startup.measure,
    "polling": polling.measure,
    "guests": guests.measure,
    "memory": memory.measure,
    "idle": idle.measure,
    "orders": orders.measure,
    "boot": boot.measure,  # the longest last: it is what a quick run may have no time for
}
_JSON = Path("build/bench.json")
_QUICK_S = 250.0
"""What is left of five minutes then is for ending guests and daemons."""


async def run(names: list[str], bench: Bench) -> tuple[dict[str, list[Row]], bool]:
    """Measure one family after another; also tells whether none has failed."""
    results: dict[str, list[Row]] = {}
    well = True
    for name in names:
        results[name] = []
        bench.say(f"[bold]{name}")
        try:
            async with asyncio.timeout(bench.left_s):
                async for row in FAMILIES[name](bench):
                    results[name].append(row)
                    verdict = {True: "reached", False: "[red]missed[/]", None: "reported"}[row.met]
                    bench.say(f"{row.what}: {row.ratio.median:.3g} of {row.against}; {verdict}")
        except Exception as error:  # noqa: BLE001 - the others are measured all the same
            if isinstance(error, OutOfTime) or bench.out_of_time:
                bench.say(f"[yellow]{name}: no time for (all of) it; run it with ONLY={name}")
                continue
            well = False
            bench.console.print_exception()
    return results, well


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", default="", help=f"of {', '.join(FAMILIES)}; comma-separated")
    parser.add_argument("--quick", action="store_true", help="few rounds; ends within five minutes")
    parser.add_argument("--json", type=Path, default=_JSON, help="where all samples go")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name] or list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    directory = default_state("gpud-bench")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    directory.chmod(0o711)
    about = report.machine(directory)
    ends_at = time.monotonic() + _QUICK_S if arguments.quick else None
    bench = Bench(directory, arguments.quick, ends_at, Console(stderr=True))
    results, well = asyncio.run(run(names, bench))
    shutil.rmtree(directory)
    report.show(results, Console(width=None if sys.stdout.isatty() else 160))
    report.write_json(results, about, arguments.json)
    if well and names == list(FAMILIES) and not arguments.quick:
        report.write_page(results, about)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
