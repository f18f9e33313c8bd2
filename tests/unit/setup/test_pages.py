"""Huge pages: how many, on which node, and who sets them aside."""

from __future__ import annotations

import pytest

from gpud.setup.bootloader import DROP_IN
from gpud.setup.change import State
from gpud.setup.pages import FILE
from tests.unit.setup.host import Host

NODES = "/sys/devices/system/node"


@pytest.fixture
def host(host: Host) -> Host:
    """Two nodes of 64 GiB, with one H100 on each; each is sold with 16 GiB."""
    for node in range(2):
        host.write(f"{NODES}/node{node}/cpulist", "0-3\n")
        host.write(f"{NODES}/node{node}/meminfo", f"Node {node} MemTotal:  67108864 kB\n")
        for kib in (2048, 1048576):
            host.write(pool(node, kib), "0\n")
    host.kernel.add_function("0000:02:00.0", driver="nvidia", group=2, numa_node=1)
    host.configure(guest={"hugepages": "1G"})
    return host


def pool(node: int, kib: int) -> str:
    return f"{NODES}/node{node}/hugepages/hugepages-{kib}kB/nr_hugepages"


async def test_gigantic_pages_are_counted_by_node(host: Host) -> None:
    await host.make()
    assert "hugepagesz=1G hugepages=0:16,1:16" in host.text(DROP_IN)


async def test_pages_are_where_the_cards_are(host: Host) -> None:
    host.kernel.add_function("0000:03:00.0", driver="nvidia", group=3, numa_node=1)
    await host.make()
    assert "hugepages=0:16,1:32" in host.text(DROP_IN)


async def test_without_a_card_on_offer_none_are_wanted(host: Host) -> None:
    host.configure(guest={"hugepages": "1G"}, offers=[])
    assert not [one for one in await host.plan() if "huge" in one.name]


async def test_a_node_without_cards_has_none(host: Host) -> None:
    host.kernel.pull(host.gpu)
    await host.make()
    assert "hugepages=1:16" in host.text(DROP_IN)


async def test_pages_for_cards_that_tell_no_node_are_spread(host: Host) -> None:
    host.kernel.add_function("0000:03:00.0", driver="nvidia", group=3, numa_node=-1)
    await host.make()
    assert "hugepages=0:24,1:24" in host.text(DROP_IN)


async def test_the_host_keeps_its_reserve_and_what_is_short_is_told(host: Host) -> None:
    host.configure(guest={"hugepages": "1G"}, host_reserve={"memory_gib": 100})
    (short,) = [one for one in await host.plan() if one.name == "huge pages"]
    assert short.state is State.BY_HAND
    assert short.what.startswith("with all cards sold, guests would need 4096 MiB more")
    await host.make()
    assert "hugepages=0:14,1:14" in host.text(DROP_IN)


async def test_pages_that_are_taken_already_count_as_memory(host: Host) -> None:
    await host.make()
    for node in range(2):
        host.write(pool(node, 1048576), "16\n")
    host.boot()
    assert await host.state("huge pages") is State.FINE
    assert await host.state("kernel arguments") is State.FINE


async def test_enough_pages_that_somebody_else_set_aside_are_fine(host: Host) -> None:
    for node in range(2):
        host.write(pool(node, 1048576), "20\n")
    assert await host.state("huge pages") is State.FINE
    assert not [one for one in await host.plan() if one.name == "kernel arguments"]


async def test_too_few_pages_of_somebody_elses_are_his_to_change(host: Host) -> None:
    host.write("/proc/cmdline", "intel_iommu=on iommu=pt hugepagesz=1G hugepages=8\n")
    (found,) = [one for one in await host.plan() if one.name == "huge pages"]
    assert found.state is State.BY_HAND
    assert "booted with hugepagesz=1G hugepages=8, which is too little" in found.what


async def test_small_pages_are_set_aside_at_once_by_node(host: Host) -> None:
    host.configure(guest={"hugepages": "2M"})
    assert await host.make() == [f"systemd-tmpfiles --create {FILE}"]
    assert [host.text(pool(node, 2048)) for node in range(2)] == ["8192\n", "8192\n"]
    assert await host.state("huge pages") is State.FINE


async def test_small_pages_that_are_not_to_be_had_now_wait_for_a_boot(host: Host) -> None:
    host.configure(guest={"hugepages": "2M"})
    await host.make()
    host.write(pool(1, 2048), "100\n")
    found = await host.item("huge pages")
    assert (found.state, "scattered" in found.why) == (State.REBOOT, True)


async def test_pages_that_nobody_asks_for_any_more_are_told(host: Host) -> None:
    host.configure(guest={"hugepages": "2M"})
    await host.make()
    host.configure()
    found = await host.item("huge pages")
    assert (found.state, FILE in found.mend) == (State.BY_HAND, True)
    host.configure(guest={"hugepages": "1G"})
    await host.make()
    host.configure()
    assert "hugepages" not in " ".join(
        one.what for one in await host.plan() if one.name == "kernel arguments"
    )


async def test_a_mount_of_the_size_is_made_and_libvirt_told(host: Host) -> None:
    ran = await host.make()
    assert "systemctl enable --now dev-hugepages1G.mount" in ran
    assert ran[-1] == "systemctl try-restart libvirtd.service"
    host.units["libvirtd.service"] = "disabled"
    change = await host.change("libvirt")
    assert change.name == "libvirt"


async def test_a_mount_that_is_there_is_enough(host: Host) -> None:
    host.write("/proc/mounts", "x /dev/hugepages1G hugetlbfs rw,pagesize=1024M 0 0\n")
    assert not [one for one in await host.plan() if one.name == "hugetlbfs of 1G"]


async def test_a_libvirt_that_nobody_starts_is_not_restarted(host: Host) -> None:
    host.units = {}
    assert not any("try-restart" in line for line in await host.make())
