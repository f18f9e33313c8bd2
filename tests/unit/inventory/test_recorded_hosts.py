"""Recorded servers (tests/data/hosts) through the whole inventory, NVML included where they have it."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from gpud.configfile import parse_config
from gpud.host import capacity, iommu, livebus
from gpud.host.nvml import Nvml
from gpud.host.sysfs import Sysfs
from gpud.inventory import CardState, Inventory, Why
from gpud.store import Store
from tests.unit.conftest import Recorded
from tests.unit.fakes import recorded_host
from tests.unit.inventory.conftest import CONFIG

pytestmark = pytest.mark.real_command("gcc", "head", Path(sys.executable).name)

BOARD = "gpus: {nvswitch_board: %s}"


class Replay:
    """A recorded server's inventory after the first look."""

    def __init__(self, view: Inventory) -> None:
        self.view = view
        self.cards = {str(card.address)[5:-5]: card for card in view.cards}

    def of(self, name: str) -> list[object]:
        return [getattr(card, name) for card in self.cards.values()]

    def functions(self) -> list[list[str]]:
        return [[str(one)[5:] for one in card.functions] for card in self.cards.values()]

    def whys(self) -> set[Why]:
        return {reason.why for card in self.cards.values() for reason in card.reasons}


Look = Callable[..., Awaitable[Replay]]


@pytest.fixture
def replay(tmp_path: Path, store: Store, recorded: Recorded, nvml_library: Path) -> Look:
    async def look(name: str, config: str = "", *, driver_gone: bool = False) -> Replay:
        host = recorded(name)
        env = {"LD_LIBRARY_PATH": str(nvml_library)}
        env["FAKE_NVML"] = "/nonexistent" if driver_gone or host.nvml is None else str(host.nvml)
        view = Inventory(
            parse_config(CONFIG + config),
            partial(capacity.measure, tmp_path, proc=host.proc, sysfs=host.sysfs),
            partial(livebus.read, Sysfs(host.sysfs)),
            Nvml(env=env, proc=host.proc),
            store,
            read_iommu=partial(iommu.facts, host.sysfs, host.proc),
        )
        await view.refresh()
        return Replay(view)

    return look


@pytest.mark.parametrize("name", recorded_host.names())
async def test_every_card_is_either_sold_or_told_why_not(replay: Look, name: str) -> None:
    host = await replay(name)
    assert host.cards
    for card in host.cards.values():
        assert (card.gpu is not None) == (card.state is CardState.AVAILABLE) == (not card.why_not)
        assert card.address in card.functions
        assert card.ids
    assert Why.CHANGED not in host.whys()
    # A second look, with what the first has written down, says the same.
    before = host.view.cards
    await host.view.refresh()
    assert [card.why_not for card in host.view.cards] == [card.why_not for card in before]


async def test_hgx_h100_is_refused_until_the_operator_decides(replay: Look) -> None:
    host = await replay("hgx-h100-x8")
    assert host.of("gpu_type") == ["h100_sxm"] * 8
    assert host.whys() == {Why.BOARD}
    assert {card.name for card in host.cards.values()} == {"NVIDIA H100 80GB HBM3"}


async def test_hgx_h100_one_by_one(replay: Look) -> None:
    host = await replay("hgx-h100-x8", BOARD % "single")
    gpus = host.view.host.gpus
    assert [gpu.numa_node for gpu in gpus] == [0] * 4 + [1] * 4
    assert all(gpu.functions == (gpu.address,) for gpu in gpus)
    assert {(gpu.bundle, gpu.nvlink) for gpu in gpus} == {("", "")}
    assert [node.number for node in host.view.host.nodes] == [0, 1]


async def test_hgx_h100_whole(replay: Look) -> None:
    host = await replay("hgx-h100-x8", BOARD % "whole")
    assert len(host.view.host.gpus) == 8
    assert {(gpu.bundle, gpu.nvlink) for gpu in host.view.host.gpus} == {("0000:18:00.0",) * 2}
    assert host.functions()[0] == ["18:00.0", "05:00.0", "06:00.0", "07:00.0", "08:00.0"]
    assert host.functions()[1:] == [
        [f"{bus}:00.0"] for bus in ("2a", "3a", "5d", "9a", "ab", "ba", "db")
    ]


async def test_hgx_h100_on_vfio_since_boot(replay: Look) -> None:
    host = await replay("hgx-h100-vfio", BOARD % "single")
    assert host.view.nvml_problem is not None
    assert host.of("driver") == ["vfio-pci"] * 8
    assert [gpu.bundle for gpu in host.view.host.gpus] == [
        *("0000:11:00.0", "0000:11:00.0", "", ""),
        *("0000:86:00.0", "0000:86:00.0", "", ""),
    ]
    host = await replay("hgx-h100-vfio", BOARD % "whole")
    assert {gpu.bundle for gpu in host.view.host.gpus} == {"0000:11:00.0"}
    assert len(host.view.host.gpus) == 8
    assert len(host.functions()[0]) == 5


async def test_a100_pcie(replay: Look) -> None:
    host = await replay("a100-pcie-x4")
    gpus = host.view.host.gpus
    assert [gpu.gpu_type for gpu in gpus] == ["a100_80gb"] * 4
    assert [gpu.numa_node for gpu in gpus] == [0, 0, 1, 1]
    assert [gpu.nvlink for gpu in gpus] == ["0000:17:00.0"] * 2 + ["0000:b1:00.0"] * 2
    assert {gpu.bundle for gpu in gpus} == {""}
    assert host.of("vram_mib") == [81920] * 4


async def test_a100_pcie_after_its_driver_is_gone(replay: Look) -> None:
    first = await replay("a100-pcie-x4")
    again = await replay("a100-pcie-x4", driver_gone=True)
    assert again.view.nvml_problem is not None
    assert again.of("uuid") == first.of("uuid")
    assert again.of("nvlink") == first.of("nvlink")
    assert again.view.host.gpus == first.view.host.gpus


async def test_rtx_4090s_with_their_audio(replay: Look) -> None:
    host = await replay("rtx4090-x8")
    assert [gpu.gpu_type for gpu in host.view.host.gpus] == ["rtx_4090"] * 8
    assert host.functions() == [
        [f"{bus}:00.0", f"{bus}:00.1"] for bus in ("16", "36", "46", "56", "98", "b8", "c8", "d8")
    ]
    assert host.of("numa_node") == [0] * 4 + [1] * 4


async def test_rtx_3090(replay: Look) -> None:
    host = await replay("rtx3090")
    (gpu,) = host.view.host.gpus
    assert (gpu.gpu_type, gpu.numa_node, len(gpu.functions)) == ("rtx_3090", None, 2)


async def test_rtx_3090_among_the_boards_own_devices(replay: Look) -> None:
    host = await replay("rtx3090-shared")
    assert host.view.host.gpus == ()
    assert host.whys() == {Why.FOREIGN_DEVICE}
    told = "".join(host.cards["04"].why_not)
    for stranger in ("USB controller, xhci_hcd", "SATA controller, ahci", "NVMe drive, nvme"):
        assert stranger in told
    assert "pcieport" not in told


async def test_rtx_3090s_without_an_iommu(replay: Look) -> None:
    host = await replay("rtx3090-x2-no-iommu")
    assert host.view.host.gpus == ()
    assert host.whys() == {Why.IOMMU}
    assert host.of("iommu_group") == [None, None]


async def test_l40s_half_of_them_on_vfio(replay: Look) -> None:
    host = await replay("l40s-x2-mixed")
    assert [gpu.gpu_type for gpu in host.view.host.gpus] == ["l40s", "l40s"]
    assert host.of("vram_mib") == [None, 46068]
    assert host.of("name") == ["NVIDIA L40S", "NVIDIA L40S"]


async def test_cards_that_gpu_ai_does_not_buy(replay: Look) -> None:
    host = await replay("rtx2080ti-shared")
    assert host.view.host.gpus == ()
    assert host.whys() == {Why.NOT_A_TYPE, Why.FOREIGN_DEVICE}
    assert len(host.functions()[0]) == 4  # with USB and UCSI
