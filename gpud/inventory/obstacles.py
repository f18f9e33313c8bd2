"""Asks the hand-over itself, look by look, what would keep it from taking each card."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final

import structlog

from gpud.host.obstacle import Obstacle
from gpud.host.vfio import Handover
from gpud.inventory.card import Card
from gpud.inventory.facts import Facts
from gpud.model import PciAddress

_log = structlog.get_logger()

_ANSWER_S: Final = 10.0
_UNANSWERED: Final = Obstacle(
    f"what would keep it from being handed over cannot be seen within {_ANSWER_S:g} s",
    "a process or a device holds up the kernel: see dmesg",
)

Together = tuple[PciAddress, ...]
"""Functions that are only handed over together."""
Answers = Mapping[Together, tuple[Obstacle, ...]]


class Obstacles:
    """What the hand-over says against cards.

    Args:
        handover: None where nothing is ever handed over.
    """

    def __init__(self, handover: Handover | None) -> None:
        self._handover = handover
        self._turn = asyncio.Lock()
        self._asking: asyncio.Future[Answers] | None = None
        self._answers: Answers = {}

    async def of(
        self, cards: Iterable[Card], facts: Facts
    ) -> dict[PciAddress, tuple[Obstacle, ...]]:
        """Ask about all cards that no instance has.

        The answer comes from a thread. If it is late, the one before counts, and nobody asks again
        until it is there: a device that holds up its reader must not hide the other cards.
        """
        if self._handover is None or not (together := _together(cards)):
            return {}
        persistence_off = [
            gpu.address for gpu in facts.nvml.gpus.values() if gpu.persistence is False
        ]
        ask = partial(
            self._handover.obstacles,
            set(together.values()),
            facts.tree,
            facts.iommu,
            persistence_off,
        )
        answers = await self._ask(ask)
        return {
            address: answers.get(functions, (_UNANSWERED,))
            for address, functions in together.items()
        }

    async def _ask(self, ask: Callable[[], Answers]) -> Answers:
        async with self._turn:
            if self._asking is not None:  # about a former look: what it says is of no use any more
                await asyncio.wait({self._asking}, timeout=_ANSWER_S)
            if self._asking is None or self._asking.done():
                self._asking = asyncio.ensure_future(asyncio.to_thread(ask))
                await asyncio.wait({self._asking}, timeout=_ANSWER_S)
                if self._asking.done():
                    done, self._asking = self._asking, None
                    self._answers = done.result()
                    return self._answers
            _log.warning("cannot see within the time what keeps cards from being handed over")
            return self._answers


def _together(cards: Iterable[Card]) -> dict[PciAddress, Together]:
    """What goes with each card that may be handed over: all of its bundle, none of it claimed."""
    bundles: dict[str, list[Card]] = {}
    for card in cards:
        bundles.setdefault(card.bundle or str(card.address), []).append(card)
    return {
        card.address: tuple(function for one in bundle for function in one.functions)
        for bundle in bundles.values()
        if all(one.functions and one.instance is None for one in bundle)
        for card in bundle
    }
