"""What is left on the host of instances that have ended, or never were."""

from __future__ import annotations

from collections.abc import Iterator

from gpud.audit.facts import Facts, Finding, Kind
from gpud.guest.disk import InstanceFiles
from gpud.lifecycle.steps import lease_holder
from gpud.model import Step

_REPAIR = "gpud check --repair"


def leftovers(facts: Facts) -> Iterator[Finding]:
    """Domains, files, consoles and leases of ours that no live instance has."""
    yield from _domains(facts)
    for upstream_id, names in sorted(facts.directories.items()):
        yield from _directory(upstream_id, names, facts)
    for upstream_id in sorted(facts.consoles - facts.record.live.keys() - facts.record.failed):
        console = facts.config.state_dir / "console" / f"{upstream_id}.log"
        yield _left("console", upstream_id, f"{console} is kept of a guest that ended well")
    for lease in facts.leases:
        holder = lease_holder(lease, facts.record.owner)
        if holder is not None and holder not in facts.record.live:
            what = f"network {facts.config.network.name} holds {lease.address} for it"
            yield _left("lease", holder, what)


def _left(what: str, upstream_id: str, told: str) -> Finding:
    return Finding(Kind.LEAK, f"{what} of {upstream_id}", told, _REPAIR, repairable=True)


def _domains(facts: Facts) -> Iterator[Finding]:
    for domain in facts.domains:
        if domain.identity is None or domain.identity.owner != facts.record.owner:
            continue
        upstream_id = domain.identity.upstream_id
        instance = facts.record.live.get(upstream_id)
        if instance is None:
            yield _left("domain", upstream_id, f"{domain.name} runs, and no live instance has it")
        elif domain.uuid != instance.domain_uuid:
            yield Finding(
                Kind.DOUBLE_CLAIM,
                f"domain of {upstream_id}",
                f"{domain.name} ({domain.uuid}) says it is its, and is not the one that gpud made",
                f"virsh destroy {domain.uuid}",
            )


def _directory(upstream_id: str, names: frozenset[str], facts: Facts) -> Iterator[Finding]:
    files = InstanceFiles.of(facts.config.state_dir, upstream_id)
    foreign = sorted(name for name in names if not files.owns(name))
    instance = facts.record.live.get(upstream_id)
    if foreign:
        yield Finding(
            Kind.UNKNOWN,
            f"directory of {upstream_id}",
            f"{files.directory} holds what gpud did not make: {', '.join(foreign)}",
            "find out whose it is, and move it away",
        )
    if instance is None and (set(names) - set(foreign) or not foreign):
        yield _left("directory", upstream_id, f"{files.directory} is there without an instance")
    if instance is not None and instance.step is Step.RUNNING:
        complete = {one.name for one in (files.base, files.disk, files.seed, files.nvram)}
        for name in sorted(names - complete - set(foreign)):
            yield Finding(
                Kind.LEAK,
                f"directory of {upstream_id}",
                f"{files.directory / name} is left over from the making of its guest",
                f"rm {files.directory / name}",
            )
