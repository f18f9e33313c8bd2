"""Whether a guest that is up has all that is its own: domain, files, lease, cards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gpud.audit.facts import Facts, Finding, Kind
from gpud.guest.disk import InstanceFiles
from gpud.host.pci import VFIO_PCI
from gpud.hypervisor.domains import Domain, DomainState
from gpud.hypervisor.networkxml import Lease, render_lease
from gpud.lifecycle.cards import functions_of
from gpud.lifecycle.steps import lease_name
from gpud.model import RELEASE_STEPS, Instance, Step

_UP: Final = frozenset({Step.AWAIT_READY, Step.RUNNING})
"""Steps at which everything is there. Between others, an instance may have any part of its own."""

_STOPPED: Final = RELEASE_STEPS - {Step.STOP_DOMAIN}

_RESUME: Final = {DomainState.PAUSED: "resume", DomainState.SUSPENDED: "dompmwakeup"}

_ALIVE: Final = frozenset({DomainState.RUNNING, DomainState.BLOCKED})


def things(facts: Facts) -> Iterator[Finding]:
    """What live instances lack, and what of theirs is not as it was made."""
    domains = {domain.uuid: domain for domain in facts.domains}
    for instance in facts.record.live.values():
        domain = domains.get(instance.domain_uuid)
        if instance.step in _UP:
            yield from _domain(instance, domain)
            yield from _files(instance, facts)
            yield from _lease(instance, facts)
            yield from _passed(instance, facts)
        elif instance.step in _STOPPED and domain is not None:
            yield Finding(
                Kind.LEAK,
                instance.upstream_id,
                f"was stopped, and its domain {domain.name} runs",
                f"virsh destroy {domain.name}",
            )


def _domain(instance: Instance, domain: Domain | None) -> Iterator[Finding]:
    name = instance.domain_name
    if domain is None:
        yield Finding(
            Kind.CONTRADICTION,
            instance.upstream_id,
            f"is {instance.status.value}, and its domain {name} does not run",
            "gpud starts it again by itself; if it does not, systemctl restart gpud",
        )
    elif domain.state not in _ALIVE:
        resume = _RESUME.get(domain.state, "destroy")  # a guest that is gone is started again
        yield Finding(
            Kind.CONTRADICTION,
            instance.upstream_id,
            f"is {instance.status.value}, and its domain {name} is {domain.state.value}",
            _when_there_is_room(name)
            if domain.io_error
            else f"virsh domstate --reason {name} says why; then virsh {resume} {name}",
        )


def _when_there_is_room(name: str) -> str:
    return (
        "free space where state_dir is: gpud resumes it within the minute, and so does"
        f" virsh resume {name}"
    )


def _files(instance: Instance, facts: Facts) -> Iterator[Finding]:
    files = InstanceFiles.of(facts.config.state_dir, instance.upstream_id)
    there = facts.directories.get(instance.upstream_id, frozenset())
    needed = [files.base, files.disk, files.seed]
    needed += [files.nvram] if facts.config.guest.firmware == "uefi" else []
    for file in needed:
        if file.name not in there:
            yield Finding(
                Kind.CONTRADICTION,
                instance.upstream_id,
                f"is {instance.status.value}, and {file} is gone",
                "its guest may run on, and cannot be started again:"
                f" gpud instances stop {instance.upstream_id} --reason 'its disk is gone'",
            )


def _lease(instance: Instance, facts: Facts) -> Iterator[Finding]:
    address, mac = instance.grant.address, instance.mac
    if address is None or any((one.mac, one.address) == (mac, address) for one in facts.leases):
        return
    network = facts.config.network.name
    lease = Lease(mac, address, lease_name(instance.upstream_id, facts.record.owner))
    yield Finding(
        Kind.CONTRADICTION,
        instance.upstream_id,
        f"has the address {address}, which network {network} does not give to its MAC {mac}",
        f"virsh net-update {network} add-last ip-dhcp-host '{render_lease(lease)}' --live --config",
    )


def _passed(instance: Instance, facts: Facts) -> Iterator[Finding]:
    granted = set(functions_of(instance.grant))
    passed = {one for one, name in facts.passed.items() if name == instance.domain_name}
    for function in sorted(granted ^ passed):
        which = "has not" if function in granted else "was not sold, but has,"
        yield Finding(
            Kind.CONTRADICTION,
            instance.upstream_id,
            f"{which} {function} in its domain {instance.domain_name}",
            f"virsh destroy {instance.domain_name} has gpud start it again as it was sold",
        )
    for function in sorted(granted):
        driver = facts.drivers.get(function)
        if driver != VFIO_PCI:
            yield Finding(
                Kind.CONTRADICTION,
                instance.upstream_id,
                f"has {function}, which is bound to {driver or 'no driver'} instead of {VFIO_PCI}",
                f"dmesg | grep {function} says what happened to it",
            )
