"""Reading the PCI bus, where a reader may hang and a guest may be resetting its card."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from gpud.errors import GpudError
from gpud.host.pci import PciTree
from gpud.inventory import bus
from gpud.inventory.bus import Bus
from tests.unit.inventory.parts import at, gpu, tree

SILENT = b"\xff" * 64


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "_ASK_AGAIN_S", 0)


def reading(*trees: PciTree) -> Bus:
    """A bus that looks like this, then like that."""
    left: Iterator[PciTree] = iter(trees)
    return Bus(lambda: next(left))


async def test_what_has_left_the_bus_is_lost() -> None:
    one = reading(tree(gpu("3b")))
    assert await one.lost([at("3b"), at("3c")]) == [at("3c")]


async def test_what_stays_silent_is_lost() -> None:
    silent = tree(gpu("3b", config_header=SILENT), gpu("3c"))
    assert await reading(silent, silent).lost([at("3b"), at("3c")]) == [at("3b")]


async def test_what_answers_again_is_not_lost() -> None:
    silent = tree(gpu("3b", config_header=SILENT))
    assert await reading(silent, tree(gpu("3b"))).lost([at("3b")]) == []


async def test_many_who_ask_share_one_look() -> None:
    one = reading(tree(gpu("3b")))
    for _ in range(3):
        assert await one.lost([at("3b")]) == []


async def test_an_old_look_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "_FRESH_S", -1)
    one = reading(tree(gpu("3b")), tree())
    assert await one.lost([at("3b")]) == []
    assert await one.lost([at("3b")]) == [at("3b")]


async def test_a_hanging_read_is_given_up_and_not_begun_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bus, "_READ_S", 0.02)
    let_go = threading.Event()
    reads = 0

    def hang() -> PciTree:
        nonlocal reads
        reads += 1
        let_go.wait(10)
        return tree(gpu("3b"))

    one = Bus(hang)
    for _ in range(2):
        with pytest.raises(GpudError, match="PCI bus cannot be read") as raised:
            await one.tree()
        assert raised.value.transient
    assert reads == 1
    let_go.set()
    await asyncio.sleep(0.01)
    assert (await one.tree()).get(at("3b")) is not None


async def test_a_read_that_fails_is_made_anew() -> None:
    answers: Iterator[PciTree | OSError] = iter([OSError("gone"), tree()])

    def read() -> PciTree:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    one = Bus(read)
    with pytest.raises(OSError, match="gone"):
        await one.tree()
    assert await one.tree() == tree()
