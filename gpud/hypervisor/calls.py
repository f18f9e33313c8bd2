"""Blocking calls with a time limit, off the event loop, in turn per key.

A call into libvirt can hang for minutes (a guest's memory being pinned) or for ever (a wedged
daemon), and a thread cannot be interrupted. So a caller can be released, but the call cannot: it stays
in its thread, and whatever follows under the same key waits until it has really returned. A stop can
therefore never overtake a start that hangs.

Each call has a thread to itself, one that has come back from an earlier call or a new one, never one of
a number. Calls that hang then never starve the others, there is at most one of them per key, and being
daemon threads they do not hold up the end of the process, which ``concurrent.futures`` would.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")

_Inbox = SimpleQueue[tuple[Future[Any], Callable[[], Any]]]
_IDLE_S: Final = 1.0
"""An order's calls follow each other at once; then for minutes there are none."""


class Calls:
    """Runs blocking functions for coroutines."""

    def __init__(self, at_once: int) -> None:
        """Prepare for at most ``at_once`` calls that somebody still waits for."""
        self._slots = asyncio.Semaphore(at_once)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._threads = _Threads()
        self._in_thread = 0

    @property
    def in_thread(self) -> int:
        """How many calls have not returned, those included that nobody waits for any more."""
        return self._in_thread

    async def run(self, key: str, act: Callable[[], T], timeout_s: float | None) -> T:
        """Run ``act`` in a thread once every earlier call under ``key`` has returned.

        A caller that gives up before its turn has come takes the call back: it never begins.

        Raises:
            TimeoutError: No result within ``timeout_s`` (None: no limit), the wait for its turn included.
            Exception: Whatever ``act`` raises.
        """
        turn = self._turns.setdefault(key, asyncio.Lock())
        async with asyncio.timeout(timeout_s):
            await turn.acquire()
            try:
                await self._slots.acquire()
            except BaseException:
                turn.release()
                raise
            try:
                return await asyncio.shield(self._begin(turn, act))
            finally:
                # The slot goes with the caller, the turn with the thread (see _begin).
                self._slots.release()

    def _begin(self, turn: asyncio.Lock, act: Callable[[], T]) -> asyncio.Future[T]:
        outcome: Future[T] = Future()
        outcome.set_running_or_notify_cancel()
        result = asyncio.wrap_future(outcome)

        def returned(result: asyncio.Future[T]) -> None:
            result.exception()  # the caller may be gone: mark it as seen
            self._in_thread -= 1
            turn.release()

        result.add_done_callback(returned)
        self._in_thread += 1
        try:
            self._threads.begin(outcome, act)
        except RuntimeError as error:  # no more threads for now: the call has ended without one
            outcome.set_exception(error)
        return result


class _Threads:
    """As many threads as there are calls under way; one without a call soon ends."""

    def __init__(self) -> None:
        self._idle: list[_Inbox] = []

    def begin(self, outcome: Future[T], act: Callable[[], T]) -> None:
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            threading.Thread(
                target=self._work, args=(inbox,), name="libvirt-call", daemon=True
            ).start()
        inbox.put((outcome, act))

    def _work(self, inbox: _Inbox) -> None:
        while True:
            try:
                outcome, act = inbox.get(timeout=_IDLE_S)
            except Empty:
                try:
                    self._idle.remove(inbox)
                except ValueError:  # taken from there for a call, which is on its way
                    continue
                return
            try:
                tell = partial(outcome.set_result, act())
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                tell = partial(outcome.set_exception, error)
            self._idle.append(inbox)  # who is told begins the next call at once
            tell()
            del outcome, act, tell  # what they hold must not live until the next
