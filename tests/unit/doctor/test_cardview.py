"""The cards of recorded servers and of a fake kernel, read as ``gpud doctor`` reads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpud.doctor.account import Account
from gpud.doctor.cards import cards
from gpud.doctor.cardview import view
from gpud.doctor.check import Level
from gpud.doctor.machine import Machine
from gpud.host.nvml import Nvml
from gpud.host.sysfs import Sysfs
from gpud.inventory.facts import Record
from tests.unit.doctor.parts import REAL, level, make_config, named
from tests.unit.fakes import recorded_host
from tests.unit.fakes.kernel import FakeKernel

REAL_CARDS = make_config(**REAL)


@pytest.mark.real_command("gcc", "head", "od", Path(sys.executable).name)
async def test_a_recorded_server_with_its_nvml(tmp_path: Path, nvml_library: Path) -> None:
    host = recorded_host.unfold("l40s-x2-mixed", tmp_path)
    machine = Machine(Sysfs(host.sysfs), host.proc, uid=1000)
    nvml = Nvml(
        env={"LD_LIBRARY_PATH": str(nvml_library), "FAKE_NVML": str(host.nvml)}, proc=host.proc
    )
    seen = await view(REAL_CARDS, machine, Record(), {}, nvml, None)
    found = list(cards(seen, machine.sysfs, is_root=False))
    assert seen.nvml_problem is None
    assert named(found, "cards")[1] == "2 x NVIDIA L40S"
    assert named(found, "drivers")[1] == "1 x vfio-pci, 1 x nvidia"


@pytest.mark.real_command("head", "od")
async def test_a_recorded_desktop_whose_card_shares_its_group(tmp_path: Path) -> None:
    host = recorded_host.unfold("rtx3090-shared", tmp_path)
    machine = Machine(Sysfs(host.sysfs), host.proc, uid=0)
    seen = await view(REAL_CARDS, machine, Record(), {}, None, None)
    found = list(cards(seen, machine.sysfs, is_root=True))
    foreign = [one for one in found if one.name == "IOMMU groups"]
    assert {one.level for one in foreign} == {Level.FAULT}
    assert all("foreign device" in one.what for one in foreign)


async def test_what_the_hand_over_says_comes_in(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.add_function("0000:01:00.0", driver="nvidia", group=1)
    kernel.add_process(77, "python3", "/dev/nvidiactl")
    kernel.remove_driver("vfio-pci")
    machine = Machine(kernel.sysfs, kernel.proc, uid=0)
    seen = await view(REAL_CARDS, machine, Record(), {}, None, None)
    found = list(cards(seen, machine.sysfs, is_root=True))
    assert "the driver vfio-pci is not loaded" in named(found, "hand-over")[1]
    assert level(found, "BARs") is Level.OK


async def test_with_stand_ins_no_real_card_is_shown(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.add_function("0000:01:00.0", driver="nvidia", group=1)
    machine = Machine(kernel.sysfs, kernel.proc, uid=0)
    seen = await view(make_config(), machine, Record(), {}, None, None)
    assert [card.stand_in for card in seen.cards] == [True, True]


async def test_what_root_may_write_does_not_count_for_the_daemon(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.add_function("0000:01:00.0", driver="nvidia", group=1)
    daemon = Account("gpud", 64000, frozenset())
    for uid, worst in ((0, Level.FAULT), (1000, Level.OK)):  # the latter is judged for itself
        machine = Machine(kernel.sysfs, kernel.proc, uid=uid)
        seen = await view(REAL_CARDS, machine, Record(), {}, None, daemon)
        found = list(cards(seen, machine.sysfs, is_root=True))
        assert level(found, "hand-over") is worst
    machine = Machine(kernel.sysfs, kernel.proc, uid=0)
    seen = await view(REAL_CARDS, machine, Record(), {}, None, daemon)
    told = named(cards(seen, machine.sysfs, is_root=True), "hand-over")
    assert "install systemd/71-gpud.rules" in told[2]
