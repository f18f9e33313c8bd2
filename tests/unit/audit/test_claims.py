"""Claims that nobody has, that two have, and claims of more than there is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gpud.audit.facts import Kind
from gpud.audit.judge import judge
from gpud.config import HostReserve
from gpud.host.capacity import Capacity
from gpud.model import NumaNode
from tests.unit.audit.odds import found, rewrite
from tests.unit.lifecycle.gpud_under_test import Gpud

pytestmark = pytest.mark.leaves_a_mess

GPU = "0000:01:00.0"


async def test_a_claim_of_an_ended_instance_is_a_leak(gpud: Gpud) -> None:
    instance = await gpud.deleted(await gpud.running())
    claims = (("gpu_claim", GPU), ("address_claim", "10.77.0.10"))
    for table, one in claims:
        rewrite(gpud, f"INSERT INTO {table} VALUES (?, ?)", one, instance.upstream_id)  # noqa: S608
    rewrite(gpud, "INSERT INTO guest_input VALUES (?, '[]', NULL, NULL)", instance.upstream_id)
    leaks = [finding for finding in await gpud.findings() if finding.kind is Kind.LEAK]
    subjects = [f"GPU {GPU}", "address 10.77.0.10", instance.upstream_id]
    assert [finding.subject for finding in leaks] == subjects
    for finding in leaks:  # the mend that is shown does mend it
        rewrite(gpud, finding.mend.split('"')[1])
    assert await gpud.findings() == []


async def test_a_grant_without_its_claims_could_be_sold_again(gpud: Gpud) -> None:
    instance = await gpud.running()
    for table in ("gpu_claim", "address_claim"):
        rewrite(gpud, f"DELETE FROM {table}")  # noqa: S608
    doubles = [one for one in await found(gpud) if one[0] is Kind.DOUBLE_CLAIM]
    assert doubles == [(Kind.DOUBLE_CLAIM, instance.upstream_id)] * 2


async def test_what_two_were_given_is_a_double_claim(gpud: Gpud) -> None:
    first, second = await gpud.running("a"), await gpud.running("b")
    rewrite(
        gpud,
        "UPDATE instance SET (gpus, address) ="
        " (SELECT gpus, address FROM instance WHERE upstream_id = ?)",
        first.upstream_id,
    )
    doubles = [one for one in await gpud.findings() if one.kind is Kind.DOUBLE_CLAIM]
    assert {one.subject for one in doubles} >= {
        f"GPU {GPU}",
        "address 10.77.0.10",
        f"PCI function {GPU}",
        "PCI function 0000:01:00.1",
    }
    both = sorted([first.upstream_id, second.upstream_id])
    assert f"was given to {both[0]} and to {both[1]}" in {one.what for one in doubles}


async def test_more_cores_and_memory_than_a_node_has_are_a_double_claim(gpud: Gpud) -> None:
    await gpud.running()
    nodes = json.dumps([[0, 65, 65537]])
    rewrite(gpud, "UPDATE instance SET cpu_cores = 65, memory_mib = 65537, nodes = ?", nodes)
    findings = await gpud.findings()
    assert {finding.kind for finding in findings} == {Kind.DOUBLE_CLAIM}
    assert [f"{finding.subject}: {finding.what}" for finding in findings] == [
        "NUMA node 0: 65 cores are claimed, and it has 64",
        "NUMA node 0: 65537 MiB are claimed, and it has 65536",
        "host: 65 cores are claimed, and it has 64",
        "host: 65537 MiB are claimed, and it has 65536",
    ]


async def test_a_config_that_leaves_less_than_was_sold_is_told_as_such(gpud: Gpud) -> None:
    await gpud.running()
    facts = await gpud.facts()
    kept = HostReserve(cpu_cores=62, memory_gib=0, storage_gib=990)
    findings = judge(replace(facts, config=facts.config.model_copy(update={"host_reserve": kept})))
    assert [finding.kind for finding in findings] == [Kind.CONTRADICTION] * 2
    assert "4 cores are claimed, and the config leaves 2 for guests" in findings[0].what


async def test_a_disk_that_cannot_hold_what_was_promised_is_told(gpud: Gpud) -> None:
    await gpud.running()
    facts = replace(await gpud.facts(), capacity=Capacity((NumaNode(0, 64, 65536),), 0))
    (finding,) = judge(facts)
    assert (finding.kind, finding.subject) == (Kind.CONTRADICTION, "disk")
    assert "1 GiB are promised to guests" in finding.what
