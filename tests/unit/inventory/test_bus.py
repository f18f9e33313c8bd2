"""One reader of the PCI bus for all, and the difference between gone and silent."""

from __future__ import annotations

import asyncio

import pytest

from gpud.errors import GpudError
from gpud.host.pci import PciTree
from gpud.inventory import bus
from gpud.inventory.bus import Bus
from tests.unit.fakes.orders import Clock
from tests.unit.inventory.parts import at, gpu, tree

SILENT = b"\xff" * 64


class Reader:
    """Reads what a test put on the bus, while it is not held."""

    def __init__(self) -> None:
        self.has(gpu("3b"))
        self.clock = Clock()
        self.bus = Bus(self.read, self.clock)
        self.reads = 0
        self.at_once = 0
        self.free = asyncio.Event()
        self.free.set()

    def has(self, *functions: object) -> None:
        self.tree = tree(*functions)  # type: ignore[arg-type]

    def silences(self, *short: str) -> None:
        self.has(*(gpu(one, config_header=SILENT) for one in short))

    async def read(self) -> PciTree:
        self.reads += 1
        self.at_once += 1
        assert self.at_once == 1
        seen = self.tree
        try:
            await self.free.wait()
        finally:
            self.at_once -= 1
        return seen

    async def lost_after(self, seconds: float, *short: str) -> list[str]:
        self.clock.advance(seconds)
        lost = await self.bus.lost([at(one) for one in short or ("3b",)])
        return [f"{one.bus:02x}" for one in lost]


@pytest.fixture
def reader() -> Reader:
    return Reader()


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


# ---- lost


async def test_what_has_left_the_bus_is_lost_at_once(reader: Reader) -> None:
    assert await reader.lost_after(0, "3b", "3c") == ["3c"]


async def test_what_is_silent_is_lost_after_longer_than_a_reset_takes(reader: Reader) -> None:
    reader.silences("3b")
    assert await reader.lost_after(0) == []
    assert await reader.lost_after(40) == []
    assert await reader.lost_after(34.9) == []
    assert await reader.lost_after(5.1) == ["3b"]


async def test_silence_is_counted_from_look_to_look(reader: Reader) -> None:
    reader.silences("3b")
    await reader.bus.tree()
    reader.clock.advance(71)
    await reader.bus.tree()
    assert await reader.lost_after(4.9) == []  # 75.9 s, but the last look saw 71 of them
    assert reader.reads == 2


async def test_what_answers_in_between_is_not_lost(reader: Reader) -> None:
    reader.silences("3b", "3c")
    assert await reader.lost_after(0, "3b", "3c") == []
    reader.has(gpu("3b"), gpu("3c", config_header=SILENT))
    assert await reader.lost_after(50, "3b", "3c") == []
    reader.silences("3b", "3c")
    assert await reader.lost_after(50, "3b", "3c") == ["3c"]
    assert await reader.lost_after(50, "3b", "3c") == ["3c"]
    assert await reader.lost_after(50, "3b", "3c") == ["3b", "3c"]


async def test_another_card_in_the_same_place_is_not_silent_yet(reader: Reader) -> None:
    reader.silences("3b")
    assert await reader.lost_after(0) == []
    reader.has()
    assert await reader.lost_after(50) == ["3b"]
    reader.silences("3b")
    assert await reader.lost_after(50) == []


async def test_many_who_ask_share_one_look(reader: Reader) -> None:
    for _ in range(3):
        assert await reader.lost_after(1) == []
    assert reader.reads == 1


async def test_an_old_look_is_not_trusted(reader: Reader) -> None:
    assert await reader.lost_after(0) == []
    reader.has()
    assert await reader.lost_after(5) == []
    assert await reader.lost_after(0.1) == ["3b"]


async def test_a_fresh_look_is_a_new_one(reader: Reader) -> None:
    await reader.bus.tree()
    reader.has()
    assert await reader.bus.lost([at("3b")]) == []
    assert await reader.bus.lost([at("3b")], fresh=True) == [at("3b")]


async def test_a_read_under_way_is_not_fresh(reader: Reader) -> None:
    reader.free.clear()
    under_way = asyncio.create_task(reader.bus.tree())
    await turns()
    reader.has()  # the read under way has seen the card
    fresh = asyncio.create_task(reader.bus.lost([at("3b")], fresh=True))
    await turns()
    reader.free.set()
    assert (await under_way).get(at("3b")) is not None
    assert await fresh == [at("3b")]


# ---- reading


async def test_all_who_come_during_a_read_share_the_next(reader: Reader) -> None:
    reader.free.clear()
    first = asyncio.create_task(reader.bus.tree())
    await turns()
    later = [asyncio.create_task(reader.bus.tree()) for _ in range(20)]
    await turns()
    reader.free.set()
    await asyncio.gather(first, *later)
    assert reader.reads == 2


async def test_one_who_goes_away_takes_the_read_from_nobody(reader: Reader) -> None:
    reader.free.clear()
    gone, other = (asyncio.create_task(reader.bus.tree()) for _ in range(2))
    await turns()
    gone.cancel()
    await turns()
    reader.free.set()
    assert await other == reader.tree
    assert gone.cancelled()
    assert reader.reads == 1


async def test_a_hanging_read_is_given_up_for_all_who_wait(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "_READ_S", 0.02)
    reader.free.clear()
    waiting = [asyncio.create_task(reader.bus.tree()) for _ in range(3)]
    for one in waiting:
        with pytest.raises(GpudError, match="PCI bus cannot be read") as raised:
            await one
        assert raised.value.transient
    assert reader.reads == 1
    reader.free.set()
    assert await reader.bus.tree() == reader.tree


async def test_a_read_that_fails_is_made_anew_and_changes_nothing(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.silences("3b")
    assert await reader.lost_after(0) == []
    with monkeypatch.context() as patch:
        patch.setattr(reader, "tree", None)
        with pytest.raises(AttributeError):
            await reader.lost_after(50)
    assert await reader.lost_after(30) == ["3b"]
