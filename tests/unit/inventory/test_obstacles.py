"""What the hand-over would refuse is not sold: real hand-over, on a kernel that reacts."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from gpud.configfile import parse_config
from gpud.host import iommu, livebus
from gpud.host.nvml import Nvml
from gpud.host.vfio import Handover
from gpud.inventory import CardState, Inventory, Why, obstacles
from gpud.model import PciAddress, Step
from gpud.store import Store
from tests.unit.conftest import NvmlOn
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.orders import quick_directory
from tests.unit.inventory.conftest import CONFIG, ROOMY, Server
from tests.unit.inventory.parts import at

GPU, AUDIO, OTHER = at("01"), at("01:00.1"), at("02")
NVML = """
card 0000:0{0}:00.0
    ids 10de:2684
    subsystem 10de:16c1
    name NVIDIA GeForce RTX 4090
    uuid GPU-0000000{0}
    memory_mib 24564
    persistence {1}
"""
runs_nvml = pytest.mark.real_command("gcc", Path(sys.executable).name)


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    with quick_directory() as root:
        kernel = FakeKernel(root)
        kernel.add_function(GPU, device=0x2684, driver="nvidia", group=1)
        kernel.add_function(
            AUDIO, device=0x22BA, class_code=0x040300, driver="snd_hda_intel", group=1,
            reset_methods=(),
        )  # fmt: skip
        kernel.add_function(OTHER, device=0x2684, driver="nvidia", group=2)
        yield kernel


View = Callable[..., Inventory]


@pytest.fixture
def view(kernel: FakeKernel, store: Store) -> View:
    def make(nvml: Nvml | None = None, config: str = "") -> Inventory:
        return Inventory(
            parse_config(CONFIG + config),
            lambda: ROOMY,
            partial(livebus.read, kernel.sysfs),
            nvml,
            store,
            read_iommu=partial(iommu.facts, kernel.sysfs.root, kernel.proc),
            handover=Handover(kernel.sysfs, kernel.proc),
        )

    return make


def for_sale(view: Inventory) -> list[PciAddress]:
    return [gpu.address for gpu in view.host.gpus]


async def test_cards_with_nothing_in_the_way_are_sold(view: View) -> None:
    host = view()
    await host.refresh()
    assert for_sale(host) == [GPU, OTHER]


async def test_nothing_is_sold_without_vfio_pci(view: View, kernel: FakeKernel) -> None:
    kernel.remove_driver("vfio-pci")
    host = view()
    await host.refresh()
    assert for_sale(host) == []
    for card in host.cards:
        (why,) = card.reasons
        assert why.what == "the driver vfio-pci is not loaded"
        assert why.mend.startswith("gpud setup")
    kernel.add_driver("vfio-pci")
    await host.refresh()
    assert for_sale(host) == [GPU, OTHER]


async def test_a_card_whose_files_may_not_be_written_is_not_sold(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = f"{GPU}/reset"
    monkeypatch.setattr(os, "access", lambda file, _: not str(file).endswith(reset))
    host = view()
    await host.refresh()
    assert for_sale(host) == [OTHER]
    (why,) = host.cards[0].reasons
    assert why.what == "gpud may not write 1 of the files that a hand-over writes"
    assert why.mend.endswith(reset)
    assert why.why is Why.HAND_OVER


async def test_a_card_that_a_process_has_open_is_not_sold_and_names_it(
    view: View, kernel: FakeKernel
) -> None:
    kernel.add_node(GPU, "drm/card0")
    kernel.add_process(4242, "train.py", "/dev/dri/card0")
    host = view()
    await host.refresh()
    assert for_sale(host) == [OTHER]
    card = host.cards[0]
    assert card.state is CardState.UNAVAILABLE
    assert card.summary == f"{GPU} (10de:2684) is in use by train.py (pid 4242)"
    assert card.holder == "process 4242 (train.py)"
    assert [one.why for one in card.reasons] == [Why.HELD]
    shutil.rmtree(kernel.proc / "4242")
    await host.refresh()
    assert for_sale(host) == [GPU, OTHER]


async def test_what_the_inventory_knows_itself_is_told_once(view: View, kernel: FakeKernel) -> None:
    kernel.remove_driver("vfio-pci")
    (kernel.proc / "interrupts").write_text("")
    host = view()
    await host.refresh()
    assert [[one.why for one in card.reasons] for card in host.cards] == [[Why.IOMMU]] * 2


async def test_cards_that_share_a_group_are_no_obstacle_to_each_other(
    view: View, kernel: FakeKernel
) -> None:
    third = kernel.add_function("0000:03:00.0", device=0x2684, driver="nvidia", group=2)
    host = view()
    await host.refresh()
    assert for_sale(host) == [GPU, OTHER, third]
    kernel.add_process(4242, "train.py", "/dev/vfio/2")
    await host.refresh()
    assert for_sale(host) == [GPU]


async def test_an_instances_card_is_not_asked_about(
    view: View, kernel: FakeKernel, server: Server
) -> None:
    kernel.add_function("0000:03:00.0", device=0x2684, driver="nvidia", group=2)
    host = view()
    await host.refresh()
    instance = await server.claim(host.host.gpus[1])
    kernel.add_process(4242, "train.py", "/dev/vfio/2")
    await host.refresh()
    card, partner = host.cards[1:]
    assert (card.holder, card.why_not) == (instance.upstream_id, ())
    assert [one.why for one in partner.reasons] == [Why.PARTNER]
    await server.release(instance, Step.ENDED)
    await host.refresh()
    assert for_sale(host) == [GPU]


async def test_an_order_hides_what_was_seen_before_it(
    view: View, kernel: FakeKernel, server: Server
) -> None:
    host = view()
    await host.refresh()
    gpu = host.host.gpus[0]
    kernel.remove_driver("vfio-pci")
    await host.refresh()
    assert host.cards[0].why_not
    await server.claim(gpu)
    assert host.cards[0].why_not == ()


@runs_nvml
async def test_nvidia_persistenced_keeps_what_nvml_says_is_persistent(
    view: View, kernel: FakeKernel, nvml_on: NvmlOn
) -> None:
    kernel.add_process(777, "nvidia-persistenced", readable=False)
    host = view(nvml_on(NVML.format(1, 0) + NVML.format(2, 1)))
    await host.refresh()
    assert for_sale(host) == [GPU]
    assert f"nvidia-smi -i {OTHER} -pm 0" in host.cards[1].why_not[0]


async def test_with_stand_ins_nothing_is_asked(view: View, kernel: FakeKernel) -> None:
    kernel.remove_driver("vfio-pci")
    host = view(config="gpus: {stand_ins: [{gpu_type: l40s, count: 1}]}")
    await host.refresh()
    assert len(for_sale(host)) == 1


async def test_a_late_answer_holds_up_no_look_and_is_not_asked_for_twice(
    view: View, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was last known of a card counts meanwhile; a card that nothing is known of is not sold."""
    may_answer, asked = threading.Event(), []
    truth = Handover.obstacles

    def late(*args: object, **kwargs: object) -> object:
        asked.append(args)
        may_answer.wait(5)
        return truth(*args, **kwargs)  # type: ignore[arg-type]

    host = view()
    await host.refresh()
    monkeypatch.setattr(obstacles, "_ANSWER_S", 0.02)
    third = kernel.add_function("0000:03:00.0", device=0x2684, driver="nvidia", group=3)
    monkeypatch.setattr(
        host._obstacles._handover, "obstacles", partial(late, Handover(kernel.sysfs, kernel.proc))
    )
    await host.refresh()
    await host.refresh()
    assert len(asked) == 1
    assert for_sale(host) == [GPU, OTHER]
    card = host.card(third)
    assert card is not None
    assert "cannot be seen within" in card.summary
    may_answer.set()
    monkeypatch.setattr(obstacles, "_ANSWER_S", 5)
    await host.refresh()
    assert len(asked) == 2
    assert for_sale(host) == [GPU, OTHER, third]


async def test_looks_at_the_same_time_each_have_an_answer(view: View, kernel: FakeKernel) -> None:
    host = view()
    await asyncio.gather(host.refresh(), host.refresh())
    assert for_sale(host) == [GPU, OTHER]
    kernel.remove_driver("vfio-pci")
    await asyncio.gather(host.refresh(), host.refresh())
    assert for_sale(host) == []
