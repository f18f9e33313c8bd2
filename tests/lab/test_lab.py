"""What an operator would have to believe, shown on a server: real IOMMU, real VFIO, real guests.

Each scenario finds the server without instances. They run in this order and share its boots: its power is
cut three times in the course of an order, and once more to find its cards on vfio-pci.
"""

from __future__ import annotations

import pytest

from tests.lab import hardware, images
from tests.lab.hardware import FIRST, FOR_SALE, FOREIGN, SECOND, SHARING, THIRD
from tests.lab.lab import Lab, scenario, script
from tests.lab.mishaps import (
    held_open,
    nvml_tells_of,
    reset_fails,
    reset_hangs,
    reset_is_asked,
)
from tests.machine.processes import free_port

pytestmark = pytest.mark.asyncio(loop_scope="session")

VFIO = "vfio-pci"
OWN_DRIVERS = {
    FIRST.address: hardware.CARD_DRIVER,
    str(FIRST.companion): hardware.COMPANION_DRIVER,
    SECOND.address: hardware.CARD_DRIVER,
    THIRD.address: hardware.CARD_DRIVER,
}

# What a guest of the small image prints of the devices it has.
LIST_DEVICES = (
    "for device in /sys/bus/pci/devices/*; do",
    '  echo "sees $(cat $device/vendor $device/device | tr -d "\\n" | sed s/0x//g)"',
    "done",
    "echo all seen",
)
CARD_SEEN = f"sees {hardware.CARD_IDS.replace(':', '')}"


@scenario
async def test_1_one_card_with_its_companion(lab: Lab) -> None:
    """1 one card and its companion: driven through the IOMMU, login through the tunnel."""
    await lab.quarantine(SECOND, THIRD)
    await lab.sell_guest("whole")
    hardware.write_to_disk(FIRST, lab.server.directory, "from outside")
    tunnel_port = free_port()
    upstream_id = await lab.order(lab.tunnel.startup_script(tunnel_port))
    await lab.caller.wait_for(upstream_id, "running", timeout_s=600)

    async def inside(command: str) -> str:
        return await lab.tunnel.log_in(tunnel_port, "ubuntu", command, timeout_s=300)

    seen = await inside("lspci -n")
    assert hardware.CARD_IDS in seen
    assert hardware.COMPANION_IDS in seen
    # The card reads and writes the guest's memory: addresses that only the IOMMU makes sense of.
    assert await inside("sudo head -c 12 /dev/nvme0n1") == "from outside"
    await inside("echo from the guest | sudo dd of=/dev/nvme0n1 seek=1 conv=fsync status=none")
    assert hardware.read_from_disk(FIRST, lab.server.directory, sector=1) == "from the guest\n"
    assert await lab.interrupts(FIRST) > 0
    await lab.delete(upstream_id)
    await lab.sell_guest("small")


@scenario
async def test_2_guests_side_by_side(lab: Lab) -> None:
    """2 two guests side by side, one with two cards; nothing left to offer; then all again."""
    pair = await lab.order(script(*LIST_DEVICES), gpu_count=2)
    single = await lab.order(script(*LIST_DEVICES))
    assert await lab.caller.offerings() == []
    await lab.running(pair, single)
    theirs = [*await lab.cards_of(pair), *await lab.cards_of(single)]
    assert sorted(card.name for card in theirs) == [card.name for card in FOR_SALE]
    assert (await lab.console(pair, "all seen")).count(CARD_SEEN) == 2
    assert (await lab.console(single, "all seen")).count(CARD_SEEN) == 1
    assert set((await lab.drivers()).values()) == {VFIO}
    # As an upgrade does it: the guests do not notice, and the new daemon takes them up.
    await lab.server.run("systemctl restart gpud", timeout_s=120)
    await lab.back()
    for upstream_id in (pair, single):
        assert (await lab.caller.show(upstream_id))["status"] == "running"
        assert (await lab.instance(upstream_id))["restarts"] == 0
    await lab.command("check")  # which fails if anything is amiss
    await lab.delete(pair, single)
    await lab.offered(3)
    assert await lab.drivers() == OWN_DRIVERS


@scenario
async def test_3_a_foreign_device_in_the_group(lab: Lab) -> None:
    """3 a foreign device in a card's group: refused with its name, never bound."""
    told = await lab.command("gpus")
    line = next(line for line in told.splitlines() if SHARING.address in line)
    assert "unavailable" in line
    why_not = told.partition(f"\n{SHARING.address}\n")[2]
    assert f"foreign device in IOMMU group 8: {FOREIGN} ({hardware.FOREIGN_IDS}" in why_not
    assert await lab.available() == len(FOR_SALE)
    assert await lab.driver(SHARING.address) == hardware.CARD_DRIVER
    assert await lab.driver(FOREIGN) == hardware.FOREIGN_DRIVER
    assert SHARING.address not in await lab.server.run("journalctl -u gpud | grep -i bound || true")


@scenario
async def test_4_a_process_holds_the_driver(lab: Lab) -> None:
    """4 a process holds the cards: an order under way fails and names it; none is taken any more."""
    upstream_id = await lab.order(script())
    async with held_open(lab.server, *FOR_SALE) as pid:
        await lab.released(upstream_id)
        assert (await lab.caller.show(upstream_id))["status"] == "error"
        complaint = await lab.complaint_about(upstream_id)
        assert "sleep" in complaint
        assert str(pid) in complaint
        await lab.offered(0)
        line = next(
            line for line in (await lab.command("gpus")).splitlines() if FIRST.address in line
        )
        assert str(pid) in line
        status, _ = await lab.try_order(script())
        assert status == 409
        assert await lab.drivers() == OWN_DRIVERS
    await lab.offered(3)


@scenario
async def test_4_a_process_that_nvml_names(lab: Lab) -> None:
    """4 a process that only NVML sees: its card is not offered, and it is named."""
    pid = int(await lab.server.run("systemctl show --value -p MainPID ssh"))
    async with nvml_tells_of(lab.server, FIRST, pid):
        await lab.restart()  # rather than wait until it asks NVML again, once a minute
        gpu = await lab.gpu_state(FIRST, "unavailable")
        assert f"process {pid} (sshd)" in str(gpu["why_not"])
        await lab.offered(2)
    await lab.restart()
    await lab.offered(3)


@scenario
async def test_5_cards_pulled_out(lab: Lab) -> None:
    """5 a card is pulled out under a guest, another while it is cleaned; the third sells on."""
    first = await lab.order(script())
    second = await lab.order(script())
    await lab.running(first, second)
    (pulled,), (cleaned,) = await lab.cards_of(first), await lab.cards_of(second)

    await lab.server.pull_out(pulled)
    await lab.released(first)
    assert (await lab.caller.show(first))["status"] == "error"
    await lab.server.gone(pulled)

    async with reset_hangs(lab.server, cleaned) as let_go:
        await lab.caller.delete(second)
        await reset_is_asked(lab.server, cleaned)
        await lab.server.pull_out(cleaned)
        await lab.server.gone(cleaned)
        await let_go()
        await lab.released(second)
    assert (await lab.caller.show(second))["status"] == "terminated"
    gpus = await lab.gpus()
    for card in (pulled, cleaned):
        assert gpus[card.address]["state"] in {"quarantined", "unavailable"}
    await lab.offered(1)


@scenario
async def test_6_resets_that_fail_and_hang(lab: Lab) -> None:
    """6 one card's reset fails, another's hangs: both quarantined, until released."""
    upstream_id = await lab.order(script(), gpu_count=2)
    await lab.running(upstream_id)
    failing, hanging = await lab.cards_of(upstream_id)
    async with reset_fails(lab.server, failing), reset_hangs(lab.server, hanging):
        await lab.delete(upstream_id)
    assert (await lab.caller.show(upstream_id))["status"] == "terminated"
    for card in (failing, hanging):
        gpu = await lab.gpu_state(card, "quarantined")
        assert "reset" in str(gpu["why_not"])
    await lab.offered(1)
    told = await lab.command("gpus", "release", failing.address)
    assert failing.address in told
    await lab.release(hanging)
    await lab.offered(3)


@scenario
async def test_7_the_power_fails(lab: Lab) -> None:
    """7 the power fails in an order, under its guest, and in a release: nothing is lost or left."""
    remember = "printf 'a tenant was here' | dd of=/dev/vda bs=1M seek=900 conv=fsync"
    recall = 'echo "recalled: $(dd if=/dev/vda bs=1M skip=900 count=1 | head -c 17)"'
    drivers = await lab.drivers()
    upstream_id = await lab.order(script(recall, remember, *LIST_DEVICES))
    await lab.in_step(upstream_id, "start_domain", "await_ready")
    before = await lab.instance(upstream_id)
    await lab.server.cut_power()
    await lab.back()

    await lab.running(upstream_id)
    await lab.console(upstream_id, "all seen")
    await lab.server.cut_power()
    await lab.back()

    await lab.console(upstream_id, "recalled: a tenant was here", timeout_s=240)
    await lab.in_step(upstream_id, "running")
    after = await lab.instance(upstream_id)
    assert after["gpus"] == before["gpus"]
    assert (await lab.caller.show(upstream_id))["status"] == "running"

    await lab.caller.delete(upstream_id)
    await lab.in_step(upstream_id, "clean_gpus", "return_gpus")
    await lab.server.cut_power()
    await lab.back()
    await lab.released(upstream_id)
    assert (await lab.caller.show(upstream_id))["status"] == "terminated"
    await lab.offered(3)
    assert await lab.drivers() == drivers
    await lab.command("check")


@scenario
async def test_8_vfio_since_boot_and_no_nvml(lab: Lab) -> None:
    """8 cards on vfio-pci since boot, and no NVML: sold like any."""
    await lab.server.run((images.HERE / "vfio-at-boot.sh").read_text())
    await lab.server.cut_power()
    await lab.back()
    assert set((await lab.drivers()).values()) == {VFIO}
    await lab.offered(3)
    pair = await lab.order(script(*LIST_DEVICES), gpu_count=2)
    await lab.running(pair)
    assert (await lab.console(pair, "all seen")).count(CARD_SEEN) == 2
    await lab.delete(pair)
    await lab.offered(3)
    assert set((await lab.drivers()).values()) == {VFIO}
