"""gpud's hypervisor room against a real libvirtd and a real QEMU."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from uuid import uuid4

import libvirt
import pytest

from gpud.errors import GpudError
from gpud.hypervisor.domains import DomainState
from gpud.hypervisor.domainxml import DomainSpec, Identity, PassedCard, UserNetwork, render
from gpud.hypervisor.events import DomainEvent
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.hypervisor.networkxml import Lease, NetworkSpec
from gpud.hypervisor.passthroughxml import mmio_window_mib
from gpud.hypervisor.stream import GuestStream
from gpud.model import PciAddress
from tests.machine.private_libvirtd import PrivateDaemon, end, wait_for_libvirt

SYSTEM = "qemu:///system"
LETTERS = bytes.fromhex("ba f8 03 b0 41 ee 52 b4 86 31 c9 ba 50 c3 cd 15 5a eb f0")
"""A boot sector that writes an A to the serial port every 50 ms (BIOS: int 15h, ah 86h)."""

ENDLESS_OUTPUT = bytes.fromhex("baf803 b041 ee ebfd")
"""A boot sector: mov dx,0x3f8; mov al,'A'; again: out dx,al; jmp again."""

BIG_BAR = "pci-testdev,membar=128G,bus=port{0}"


@pytest.fixture(scope="module")
def system() -> Iterator[str]:
    """The host's libvirtd: the one that runs, or one of our own for the length of this module."""
    if os.geteuid() == 0:
        # As udev leaves it on a host; otherwise libvirt probes QEMU anew at every single call.
        kvm = Path("/dev/kvm")
        if kvm.exists() and not kvm.stat().st_mode & 0o060:
            shutil.chown(kvm, group="kvm")
            kvm.chmod(0o660)
    try:
        libvirt.open(SYSTEM).close()
    except libvirt.libvirtError:
        if os.geteuid() != 0:
            pytest.skip("no libvirtd runs, and only root can start one")
        with tempfile.TemporaryFile() as log:
            daemons = [subprocess.Popen([name], stderr=log) for name in ("virtlogd", "libvirtd")]
            wait_for_libvirt(SYSTEM, daemons[1])
            yield SYSTEM
            for daemon in reversed(daemons):
                end(daemon)
    else:
        yield SYSTEM


@pytest.fixture
def guest() -> Iterator[DomainSpec]:
    """A guest with an empty disk; firmware comes up and finds nothing to boot."""
    directory = Path(tempfile.mkdtemp(prefix="gpud-guest-", dir="/var/tmp"))
    directory.chmod(0o777)
    make_disk(directory / "disk.qcow2", b"")
    (directory / "seed.iso").write_bytes(bytes(64 * 1024))
    identifier = uuid4().hex[:16]
    yield DomainSpec(
        name=f"gpud-test-{identifier}",
        uuid=uuid4(),
        owner="machine-test",
        upstream_id=f"i-{identifier}",
        mac="52:0a:1b:2c:3d:4e",
        memory_mib=128,
        cpu_cores=1,
        domain_type="qemu",
        firmware="bios",
        base=directory / "base.qcow2",
        disk=directory / "disk.qcow2",
        seed=directory / "seed.iso",
        nvram=directory / "nvram.fd",
        network=UserNetwork(),
    )
    shutil.rmtree(directory)


def make_disk(path: Path, boot_code: bytes) -> None:
    """An overlay with nothing in it, on a base with that boot sector."""
    raw, base = path.with_suffix(".raw"), path.with_name("base.qcow2")
    sector = boot_code.ljust(510, b"\0") + (b"\x55\xaa" if boot_code else b"\0\0")
    raw.write_bytes(sector + bytes(2**20))
    commands: list[list[str | Path]] = [
        ["qemu-img", "convert", "-O", "qcow2", raw, base],
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name, path],
    ]
    for command in commands:
        subprocess.run(command, check=True)
    base.chmod(0o444)
    path.chmod(0o666)


def pci_devices(uri: str, name: str) -> str:
    command = ["virsh", "-c", uri, "qemu-monitor-command", name, "--hmp", "info pci"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def dhcp_hosts(network: str) -> str:
    return Path(f"/var/lib/libvirt/dnsmasq/{network}.hostsfile").read_text()


async def read_until(greeting: bytes, console: GuestStream) -> None:
    output = b""
    async with asyncio.timeout(120):
        while greeting not in output:
            data = await console.read()
            assert data, f"the console has ended after {output!r}"
            output += data


@asynccontextmanager
async def connected(uri: str) -> AsyncIterator[Hypervisor]:
    hypervisor = Hypervisor(uri, call_timeout_s=60, threads=4)
    task = asyncio.create_task(hypervisor.run())
    try:
        await asyncio.wait_for(hypervisor.wait_available(), 30)
        yield hypervisor
    finally:
        task.cancel()
        await asyncio.wait([task])


@asynccontextmanager
async def started(hypervisor: Hypervisor, spec: DomainSpec) -> AsyncIterator[None]:
    await hypervisor.start(spec.uuid, render(spec))
    try:
        yield
    finally:
        await hypervisor.stop(spec.uuid)


@pytest.mark.parametrize(
    ("firmware", "greeting", "at_rest"), [("bios", b"SeaBIOS", b"AAA"), ("uefi", b"BdsDxe", b"")]
)
async def test_guest_lives_and_leaves_nothing(
    system: str, guest: DomainSpec, firmware: str, greeting: bytes, at_rest: bytes
) -> None:
    make_disk(guest.disk, LETTERS)
    spec = replace(guest, firmware=firmware, stand_ins=2)  # type: ignore[arg-type]
    seen: list[DomainEvent] = []
    async with connected(system) as hypervisor:
        hypervisor.subscribe(
            lambda uuid, event, _: seen.append(event) if uuid == spec.uuid else None
        )
        async with started(hypervisor, spec):
            await hypervisor.start(spec.uuid, render(spec))
            found = await hypervisor.find(spec.uuid)
            assert found is not None
            assert found.state is DomainState.RUNNING
            assert found.identity == Identity(spec.owner, spec.upstream_id)
            assert found in await hypervisor.domains()
            assert spec.nvram.exists() is (firmware == "uefi")

            connection = libvirt.open(system)
            domain = connection.lookupByUUIDString(str(spec.uuid))
            assert not domain.isPersistent()
            # Whoever comes later gets the console: a restarted gpud meets its former self's.
            consoles = []
            for _ in range(2):
                consoles.append(await hypervisor.console(spec.uuid))
                # Reset in the middle of SeaBIOS, QEMU 7.2's emulated CPU may go on in empty memory.
                await read_until(at_rest, consoles[-1])
                domain.reset()
                await read_until(greeting, consoles[-1])
            for console in consoles:
                await console.close()
            channel = await hypervisor.channel(spec.uuid)
            await channel.close()
            assert pci_devices(system, spec.name).count("1234:11e8") == 2
        assert await hypervisor.find(spec.uuid) is None
        assert spec.name not in {domain.name() for domain in connection.listAllDomains()}
        # libvirt makes the variable store and leaves it: removing it is gpud's.
        assert spec.nvram.exists() is (firmware == "uefi")
        connection.close()
        async with asyncio.timeout(30):
            while not {DomainEvent.STARTED, DomainEvent.STOPPED} <= set(seen):
                await asyncio.sleep(0.01)


def test_libvirt_gives_qemu_each_card_on_its_own_port(system: str, guest: DomainSpec) -> None:
    """Nothing is started here: the cards need not exist."""
    cards = (("0000:41:00.0", "0000:41:00.1"), ("0001:c1:00.0", "0001:c1:00.2"))
    spec = replace(
        guest,
        cards=tuple(PassedCard(tuple(map(PciAddress.parse, card))) for card in cards),
        cpuset="0",
        nodeset="0",
    )
    connection = libvirt.open(system)
    command = connection.domainXMLToNative("qemu-argv", render(spec))
    connection.close()
    options = [json.loads(part) for part in shlex.split(command) if part.startswith("{")]
    devices = [option for option in options if "driver" in option]
    seen = {
        device["host"]: (device["bus"], device["addr"], device.get("multifunction"))
        for device in devices
        if device["driver"] == "vfio-pci"
    }
    assert seen == {
        "0000:41:00.0": ("pci.1", "0x0", True),
        "0000:41:00.1": ("pci.1", "0x0.0x1", None),
        "0001:c1:00.0": ("pci.2", "0x0", True),
        "0001:c1:00.2": ("pci.2", "0x0.0x2", None),
    }
    others = [device.get("bus") for device in devices if device["driver"] != "vfio-pci"]
    assert "pci.3" in others
    assert not {"pci.1", "pci.2"} & set(others)


async def test_guest_keeps_to_its_cpus_and_node(system: str, guest: DomainSpec) -> None:
    spec = replace(guest, cpuset="0", nodeset="0")
    async with connected(system) as hypervisor, started(hypervisor, spec):
        connection = libvirt.open(system)
        domain = connection.lookupByUUIDString(str(spec.uuid))
        allowed = (True, *[False] * (connection.getInfo()[2] - 1))
        assert [domain.vcpus()[1], [domain.emulatorPinInfo()]] == [[allowed], [allowed]]
        assert domain.numaParameters() == {"numa_mode": 0, "numa_nodeset": "0"}
        connection.close()


async def test_ovmf_finds_room_for_the_cards_memory(system: str, guest: DomainSpec) -> None:
    """Two devices with a BAR like an H100's; OVMF on its own leaves both without an address."""
    window = mmio_window_mib({PciAddress(0, bus, 0, 0): [128 * 2**30] for bus in (1, 2)})
    spec = replace(guest, firmware="uefi", mmio_window_mib=window)
    devices = ("pcie-root-port,id=port{0},chassis={0},bus=pcie.0,addr={0:#x}", BIG_BAR)
    arguments = [device.format(number) for number in (16, 17) for device in devices]
    xml = render(spec).replace(
        "<qemu:commandline>",
        "<qemu:commandline>"
        + "".join(
            f'<qemu:arg value="-device"/><qemu:arg value="{argument}"/>' for argument in arguments
        ),
    )
    async with connected(system) as hypervisor:
        await hypervisor.start(spec.uuid, xml)
        try:
            console = await hypervisor.console(spec.uuid)
            await read_until(b"BdsDxe", console)
            await console.close()
            found = re.findall(
                r"64 bit prefetchable memory at (\w+) \[\w+fffffffff\]",
                pci_devices(system, spec.name),
            )
        finally:
            await hypervisor.stop(spec.uuid)
    assert len(set(found)) == 2
    assert "0xffffffffffffffff" not in found


async def test_flooding_guest_does_not_fill_memory(system: str, guest: DomainSpec) -> None:
    make_disk(guest.disk, ENDLESS_OUTPUT)
    async with connected(system) as hypervisor, started(hypervisor, guest):
        console = await hypervisor.console(guest.uuid)
        async with asyncio.timeout(60):
            while not console.dropped_bytes:
                await asyncio.sleep(0.1)
        assert b"A" * 1000 in await console.read()
        await console.close()


async def test_unreadable_disk_is_refused_with_a_hint(system: str, guest: DomainSpec) -> None:
    guest.disk.parent.chmod(0o700)
    async with connected(system) as hypervisor:
        with pytest.raises(GpudError, match=r"Permission denied.*every directory above") as caught:
            await hypervisor.start(guest.uuid, render(guest))
        assert not caught.value.transient
        assert await hypervisor.find(guest.uuid) is None


async def test_guest_outlives_a_killed_libvirtd(private: PrivateDaemon, guest: DomainSpec) -> None:
    connects: list[bool] = []
    async with connected(private.uri) as hypervisor, started(hypervisor, guest):
        hypervisor.on_connect(lambda: connects.append(True))
        console = await hypervisor.console(guest.uuid)
        await asyncio.to_thread(private.kill)
        async with asyncio.timeout(10):
            while await console.read():
                pass
            while hypervisor.available:
                await asyncio.sleep(0.01)
        with pytest.raises(GpudError, match="cannot look up guest") as caught:
            await hypervisor.find(guest.uuid)
        assert caught.value.transient
        await asyncio.to_thread(private.start)
        await asyncio.wait_for(hypervisor.wait_available(), 60)
        assert connects == [True]
        found = await hypervisor.find(guest.uuid)
        assert found is not None
        assert found.identity == Identity(guest.owner, guest.upstream_id)
        assert found.state is DomainState.RUNNING
    assert not hypervisor.available


async def test_network_gives_each_guest_its_own_address(system: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a bridge")
    spec = NetworkSpec("gpudtest", "gpudtest", IPv4Network("10.213.77.0/24"))
    lease = Lease("52:0a:1b:2c:3d:4e", IPv4Address("10.213.77.10"), "i-1")
    async with connected(system) as hypervisor:
        try:
            for _ in range(2):
                await hypervisor.ensure_network(spec)
            for _ in range(2):
                await hypervisor.add_lease(spec.name, lease.mac, lease.address, lease.name)
            assert await hypervisor.leases(spec.name) == [lease]
            assert f"{lease.mac},{lease.address},{lease.name}" in dhcp_hosts(spec.name)
            for _ in range(2):
                await hypervisor.remove_lease(spec.name, lease.mac)
            assert await hypervisor.leases(spec.name) == []
            with pytest.raises(GpudError, match="has subnet"):
                await hypervisor.ensure_network(replace(spec, subnet=IPv4Network("10.213.78.0/24")))
            rival = replace(spec, name="gpudtest2", bridge="gpudtest2")
            with pytest.raises(GpudError, match=r"already in use.*another network\.subnet"):
                await hypervisor.ensure_network(rival)
        finally:
            connection = libvirt.open(system)
            names = {network.name() for network in connection.listAllNetworks()}
            network = connection.networkLookupByName(spec.name)
            assert "https://gpu.ai/xmlns/gpud" in network.XMLDesc()  # by which a purge knows it
            network.destroy()
            network.undefine()
            connection.close()
    assert rival.name not in names
