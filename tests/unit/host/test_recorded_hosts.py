"""Every recorded server, read as gpud reads it. What is asserted here is what the dumps told."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpud.host import iommu, pci
from gpud.host.iommu import IommuFacts
from gpud.host.nvml import Nvml, NvmlReport
from gpud.host.pci import PciFunction, PciTree
from gpud.model import GPU_TYPES, PciAddress
from tests.fake_nvml.library import build
from tests.unit.conftest import Recorded
from tests.unit.fakes import recorded_host
from tests.unit.fakes.recorded_host import RecordedHost

GIB, MIB, KIB = 2**30, 2**20, 2**10
WITH_NVML = [
    name for name in recorded_host.names() if (recorded_host.HOSTS / name / "nvml.txt").exists()
]
SAFE = IommuFacts(
    present=True,
    interrupt_remapping=True,
    unsafe_interrupts_allowed=False,
    acs_override=False,
)


@pytest.fixture(params=recorded_host.names())
def any_host(request: pytest.FixtureRequest, recorded: Recorded) -> RecordedHost:
    return recorded(request.param)


class Host:
    """A recorded server and short ways to ask about it."""

    def __init__(self, unfolded: RecordedHost) -> None:
        self.unfolded = unfolded
        self.tree: PciTree = pci.read(self.unfolded.sysfs)
        self.facts = iommu.facts(self.unfolded.sysfs, self.unfolded.proc)

    def at(self, short: str) -> PciFunction:
        return self.tree.functions[PciAddress.parse(f"0000:{short}")]

    def gpus(self) -> list[str]:
        return shorts(
            one for one in self.tree.functions.values() if one.is_nvidia and one.is_display
        )

    def switches(self) -> list[str]:
        return shorts(one for one in self.tree.functions.values() if one.is_nvswitch)

    def endpoints(self, group: int) -> list[str]:
        """What of a group would have to go where its GPU goes."""
        return shorts(one for one in self.tree.group(group) if not one.is_bridge)

    def endpoints_with(self, short: str) -> list[str]:
        group = self.at(short).iommu_group
        assert group is not None
        return self.endpoints(group)

    def node(self, short: str) -> int | None:
        return self.at(short).numa_node

    def bar_bytes(self, short: str) -> int:
        return sum(bar.size_bytes for bar in self.at(short).bars)

    def upstream(self, short: str) -> list[str]:
        return [str(above)[5:] for above in self.at(short).upstream]

    def drivers(self, short: str) -> list[str | None]:
        return [one.driver for one in self.tree.card(self.at(short).address)]


def slots(*buses: str) -> list[str]:
    return [f"{bus}:00.0" for bus in buses]


def shorts(functions: Iterator[PciFunction]) -> list[str]:
    return [str(one.address)[5:] for one in functions]


# ---- one by one


def test_hgx_h100(recorded: Recorded) -> None:
    host = Host(recorded("hgx-h100-x8"))

    assert host.facts == SAFE
    assert host.gpus() == slots("18", "2a", "3a", "5d", "9a", "ab", "ba", "db")
    assert host.switches() == slots("05", "06", "07", "08")
    assert host.endpoints(114) == host.switches()
    assert len(host.tree.group(114)) == 8  # and the four bridges above them
    assert [host.at(gpu).iommu_group for gpu in host.gpus()] == [59, 50, 41, 15, 107, 98, 89, 79]
    assert [host.node(gpu) for gpu in host.gpus()] == [0] * 4 + [1] * 4
    for gpu in host.gpus():
        assert host.endpoints_with(gpu) == [gpu]
        assert host.bar_bytes(gpu) == 128 * GIB + 48 * MIB
        assert host.at(gpu).reset_methods == ("flr", "bus")
        assert host.drivers(gpu) == ["nvidia"]
    assert host.upstream("2a:00.0") == ["26:01.0", "27:00.0", "28:01.0"]
    # The NIC beside it hangs on the same switch, in a group of its own.
    assert host.upstream("29:00.0") == ["26:01.0", "27:00.0", "28:00.0"]
    assert host.at("29:00.0").iommu_group != host.at("2a:00.0").iommu_group
    assert host.at("02:00.0").is_display  # the BMC's, not a GPU to sell
    assert not host.at("02:00.0").is_nvidia


def test_hgx_h100_on_vfio_since_boot(recorded: Recorded) -> None:
    host = Host(recorded("hgx-h100-vfio"))

    assert host.facts == SAFE
    assert host.unfolded.nvml is None
    assert host.gpus() == slots("11", "12", "41", "44", "86", "87", "bb", "be")
    assert [host.at(gpu).iommu_group for gpu in host.gpus()] == [29, 29, 17, 18, 58, 58, 49, 50]
    assert host.endpoints(29) == ["11:00.0", "12:00.0"]
    assert host.endpoints(58) == ["86:00.0", "87:00.0"]
    assert host.endpoints(17) == ["41:00.0"]
    assert [host.at(switch).iommu_group for switch in host.switches()] == [86, 87, 88, 89]
    for taken in host.gpus() + host.switches():
        assert host.at(taken).driver == "vfio-pci"
        assert host.at(taken).d3cold_allowed is False


def test_a100_pcie(recorded: Recorded) -> None:
    host = Host(recorded("a100-pcie-x4"))

    assert host.facts == SAFE
    assert host.gpus() == ["17:00.0", "31:00.0", "b1:00.0", "ca:00.0"]
    assert [host.node(gpu) for gpu in host.gpus()] == [0, 0, 1, 1]
    for gpu in host.gpus():
        assert host.endpoints_with(gpu) == [gpu]
        assert host.bar_bytes(gpu) == 128 * GIB + 48 * MIB
    assert host.upstream("ca:00.0") == ["c9:02.0"]
    assert host.switches() == []


def test_rtx_4090s(recorded: Recorded) -> None:
    host = Host(recorded("rtx4090-x8"))

    assert host.facts == SAFE
    assert host.gpus() == slots("16", "36", "46", "56", "98", "b8", "c8", "d8")
    assert [host.node(gpu) for gpu in host.gpus()] == [0] * 4 + [1] * 4
    for gpu in host.gpus():
        assert host.endpoints_with(gpu) == [gpu, gpu[:-1] + "1"]
        assert host.drivers(gpu) == ["nvidia", "snd_hda_intel"]
        assert host.bar_bytes(gpu) == 32 * GIB + 48 * MIB
        # With a neighbour on the bus the kernel offers no reset of the bus; the audio has no other.
        assert host.at(gpu).reset_methods == ("flr",)
        assert host.at(gpu[:-1] + "1").reset_methods == ()


def test_rtx_3090(recorded: Recorded) -> None:
    host = Host(recorded("rtx3090"))

    assert host.facts == SAFE
    assert host.gpus() == ["01:00.0"]
    assert host.endpoints(18) == ["01:00.0", "01:00.1"]
    assert host.node("01:00.0") is None
    assert host.bar_bytes("01:00.0") == (16 + 256 + 32) * MIB
    assert host.endpoints(6) == ["00:14.0", "00:14.2"]


def test_rtx_3090_among_the_boards_own_devices(recorded: Recorded) -> None:
    host = Host(recorded("rtx3090-shared"))

    assert host.facts == SAFE
    assert host.gpus() == ["04:00.0"]
    strangers = [one for one in host.tree.group(15) if not (one.is_bridge or one.is_nvidia)]
    assert {(one.ids, one.driver) for one in strangers} == {
        ("1022:43ee", "xhci_hcd"),
        ("1022:43eb", "ahci"),
        ("144d:a808", "nvme"),
        ("10ec:8125", "r8169"),
        ("8086:2723", "iwlwifi"),
    }
    assert sum(one.is_bridge for one in host.tree.group(15)) == 5
    assert host.upstream("04:00.0") == ["00:01.2", "02:00.2", "03:00.0"]


def test_rtx_3090s_without_an_iommu(recorded: Recorded) -> None:
    host = Host(recorded("rtx3090-x2-no-iommu"))

    assert host.facts == IommuFacts(
        present=False,
        interrupt_remapping=False,
        unsafe_interrupts_allowed=False,
        acs_override=True,
    )
    assert host.gpus() == ["0a:00.0", "0b:00.0"]
    assert {one.iommu_group for one in host.tree.functions.values()} == {None}


def test_l40s_half_of_them_on_vfio(recorded: Recorded) -> None:
    host = Host(recorded("l40s-x2-mixed"))

    assert host.facts == SAFE
    assert host.gpus() == ["61:00.0", "e1:00.0"]
    assert [host.drivers(gpu) for gpu in host.gpus()] == [["vfio-pci"], ["nvidia"]]
    assert [host.node(gpu) for gpu in host.gpus()] == [0, 1]
    assert host.bar_bytes("61:00.0") == 64 * GIB + 48 * MIB


def test_rtx_2080_ti_with_usb_and_ucsi_beside_another_card(recorded: Recorded) -> None:
    host = Host(recorded("rtx2080ti-shared"))

    assert host.gpus() == ["01:00.0", "02:00.0"]
    assert host.endpoints(1) == [f"0{bus}:00.{function}" for bus in (1, 2) for function in range(4)]
    assert len(host.tree.group(1)) == 10  # and the two root ports
    card = host.tree.card(host.at("02:00.0").address)
    assert [one.class_code >> 8 for one in card] == [0x0300, 0x0403, 0x0C03, 0x0C80]
    assert host.drivers("02:00.0") == ["nvidia", "snd_hda_intel", "xhci_hcd", "nvidia-gpu"]
    assert [bar.size_bytes for bar in card[2].bars] == [256 * KIB, 64 * KIB]


# ---- all of them


def test_what_is_recorded_makes_sense(any_host: RecordedHost) -> None:
    tree = pci.read(any_host.sysfs)

    for one in tree.functions.values():
        assert 0 not in {one.vendor, one.device, one.class_code}
        assert all(tree.functions[above].is_bridge for above in one.upstream)
        if one.upstream:
            assert one.upstream[-1].bus < one.address.bus
    assert tree.functions  # of a host with nothing, nothing would be asserted


def test_groups_have_the_members_that_the_kernel_lists(any_host: RecordedHost) -> None:
    tree = pci.read(any_host.sysfs)

    listed = {
        int(group.name): sorted(member.name for member in (group / "devices").iterdir())
        for group in (any_host.sysfs / "kernel/iommu_groups").iterdir()
    }

    numbers = {one.iommu_group for one in tree.functions.values()} - {None}
    assert set(listed) == numbers
    for number, members in listed.items():
        assert [str(one.address) for one in tree.group(number)] == members


def test_most_of_what_gpu_ai_buys_is_recorded() -> None:
    text = "".join(file.read_text() for file in recorded_host.HOSTS.glob("*/host.yaml"))
    recorded = {int(device, 16) for device in re.findall(r'ids: "10de:(\w{4})"', text)}

    for wanted in ("h100_sxm", "a100_80gb", "l40s", "rtx_4090", "rtx_3090"):
        assert GPU_TYPES[wanted].pci_ids & recorded, wanted


async def nvml_report(text: Path) -> NvmlReport:
    return await Nvml(env={"LD_LIBRARY_PATH": str(build()), "FAKE_NVML": str(text)}).report()


@pytest.mark.real_command("gcc", Path(sys.executable).name)
@pytest.mark.parametrize("name", WITH_NVML)
async def test_nvml_and_pci_speak_of_the_same_cards(name: str, recorded: Recorded) -> None:
    host = recorded(name)
    assert host.nvml is not None
    tree = pci.read(host.sysfs)

    report = await nvml_report(host.nvml)

    assert report.problem is None
    on_driver = [one.address for one in tree.functions.values() if one.driver == "nvidia"]
    assert [gpu.address for gpu in report.gpus] == on_driver
    peers = {gpu.address: gpu.nvlink_peers for gpu in report.gpus}
    for gpu in report.gpus:
        function = tree.functions[gpu.address]
        assert gpu.pci_ids == function.ids
        assert (
            gpu.subsystem_ids == f"{function.subsystem_vendor:04x}:{function.subsystem_device:04x}"
        )
        assert gpu.unhealthy == ()
        assert gpu.nvswitch == any(one.is_nvswitch for one in tree.functions.values())
        assert all(gpu.address in peers[peer] for peer in gpu.nvlink_peers)


@pytest.mark.real_command("gcc", Path(sys.executable).name)
async def test_a100s_are_linked_in_pairs() -> None:
    report = await nvml_report(recorded_host.HOSTS / "a100-pcie-x4/nvml.txt")

    assert [[str(peer) for peer in gpu.nvlink_peers] for gpu in report.gpus] == [
        ["0000:31:00.0"],
        ["0000:17:00.0"],
        ["0000:ca:00.0"],
        ["0000:b1:00.0"],
    ]
    assert {gpu.vram_mib for gpu in report.gpus} == {81920}


def test_no_real_machine_can_be_known_from_the_records() -> None:
    text = "".join(file.read_text() for file in recorded_host.HOSTS.glob("*/*"))

    uuids = re.findall(r"GPU-\S+|uuid \S+", text)
    assert uuids
    assert all("GPU-00000000-0000-4000-8000-000000000" in found for found in uuids)
    serials = re.findall(r"^ +serial (\S+)$", text, re.MULTILINE)
    assert serials
    assert all(re.fullmatch(r"1650000000\d{3}", serial) for serial in serials)
    assert not re.search(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", text, re.IGNORECASE)
    assert len(set(uuids)) == len(uuids)
    assert len(set(serials)) == len(serials)
