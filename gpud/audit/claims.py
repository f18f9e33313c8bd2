"""Whether what is claimed is claimed once, by somebody alive, and is there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gpud.audit.facts import Facts, Finding, Kind
from gpud.inventory.room import room_for_guests
from gpud.lifecycle.cards import functions_of
from gpud.model import Grant, NumaNode
from gpud.statefile import STATE_FILE

Granted = Mapping[str, Sequence[str]]
"""What instances were given, each by ``upstream_id``."""


def claims(facts: Facts) -> Iterator[Finding]:
    """Claims that differ from the grants of live instances, and grants of more than there is."""
    live = facts.record.live
    gpus = {key: [str(gpu.address) for gpu in one.grant.gpus] for key, one in live.items()}
    addresses = {key: [str(one.grant.address)] for key, one in live.items() if one.grant.address}
    functions = {key: [*map(str, functions_of(one.grant))] for key, one in live.items()}
    yield from _rows("GPU", "gpu", facts.record.gpu_claims, gpus, facts)
    yield from _rows("address", "address", facts.record.address_claims, addresses, facts)
    for what, granted in (("GPU", gpus), ("address", addresses), ("PCI function", functions)):
        yield from _twice(what, granted)
    for upstream_id in sorted(facts.record.guest_inputs - live.keys()):
        yield Finding(
            Kind.LEAK,
            upstream_id,
            "has ended, and its keys and script are still in the record",
            _delete(facts, "guest_input", "upstream_id", upstream_id),
        )
    yield from _more_than_there_is(facts)


def _rows(
    what: str, name: str, claimed: Mapping[str, str], granted: Granted, facts: Facts
) -> Iterator[Finding]:
    """Hold the table of claims whose key is ``name`` against the grants."""
    for one, upstream_id in sorted(claimed.items()):
        if one not in granted.get(upstream_id, ()):
            yield Finding(
                Kind.LEAK,
                f"{what} {one}",
                f"is claimed for {upstream_id}, which is not live or was not given it",
                _delete(facts, f"{name}_claim", name, one),
            )
    for upstream_id, given in granted.items():
        for one in given:
            if claimed.get(one) != upstream_id:
                yield Finding(
                    Kind.DOUBLE_CLAIM,
                    upstream_id,
                    f"was given {what} {one}, and has no claim that keeps it from being sold again",
                    "stop gpud and restore the state file from a backup",
                )


def _twice(what: str, granted: Granted) -> Iterator[Finding]:
    holders: dict[str, list[str]] = defaultdict(list)
    for upstream_id, given in granted.items():
        for one in given:
            holders[one].append(upstream_id)
    for one, having in sorted(holders.items()):
        if len(having) > 1:
            yield Finding(
                Kind.DOUBLE_CLAIM,
                f"{what} {one}",
                f"was given to {' and to '.join(sorted(having))}",
                "have all of these terminated but one",
            )


def _more_than_there_is(facts: Facts) -> Iterator[Finding]:
    """Compare what was sold with the host, and with what the config leaves of it for guests."""
    grants = [instance.grant for instance in facts.record.live.values()]
    room, capacity = room_for_guests(facts.config, facts.capacity), facts.capacity
    for whole, left in zip(capacity.nodes, room.nodes, strict=True):
        sold = _drawn(grants, whole.number)
        yield from _room(f"NUMA node {whole.number}", sold, whole, left)
    all_sold = NumaNode(
        0,
        sum(grant.shape.cpu_cores for grant in grants),
        sum(grant.shape.memory_mib for grant in grants),
    )
    yield from _room("host", all_sold, _sum(capacity.nodes), _sum(room.nodes))
    # The reserve is there to be used up: by images, consoles, and what else is on the disk.
    storage_gib = sum(grant.shape.storage_gib for grant in grants)
    if storage_gib > capacity.storage_gib:
        yield Finding(
            Kind.CONTRADICTION,
            "disk",
            f"{storage_gib} GiB are promised to guests, which do not fit beside what else is on it",
            f"free space in the file system of {facts.config.state_dir}",
        )


def _drawn(grants: Iterable[Grant], number: int) -> NumaNode:
    return _sum([node for grant in grants for node in grant.nodes if node.number == number])


def _sum(nodes: Iterable[NumaNode]) -> NumaNode:
    listed = list(nodes)
    cores, memory_mib = (sum(n.cpu_cores for n in listed), sum(n.memory_mib for n in listed))
    return NumaNode(0, cores, memory_mib)


def _room(where: str, sold: NumaNode, whole: NumaNode, left: NumaNode) -> Iterator[Finding]:
    cores = (sold.cpu_cores, whole.cpu_cores, left.cpu_cores)
    memory_mib = (sold.memory_mib, whole.memory_mib, left.memory_mib)
    for unit, (claimed, there, for_guests) in (("cores", cores), ("MiB", memory_mib)):
        if claimed > there:
            yield Finding(
                Kind.DOUBLE_CLAIM,
                where,
                f"{claimed} {unit} are claimed, and it has {there}",
                "have an instance terminated",
            )
        elif claimed > for_guests:
            yield Finding(
                Kind.CONTRADICTION,
                where,
                f"{claimed} {unit} are claimed, and the config leaves {for_guests} for guests:"
                " it was changed since they were sold",
                "lower host_reserve again, or wait until instances end",
            )


def _delete(facts: Facts, table: str, column: str, key: str) -> str:
    path = facts.config.state_dir / STATE_FILE
    statement = f"DELETE FROM {table} WHERE {column} = '{key}'"  # noqa: S608 - shown, not run
    return f'systemctl stop gpud; sqlite3 {path} "{statement}"; systemctl start gpud'
