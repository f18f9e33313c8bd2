from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest

from gpud.hypervisor.calls import Calls

SOON_S = 0.02


class Gate:
    """A blocking function that returns when the test lets it."""

    def __init__(self, result: str = "done") -> None:
        self.entered = threading.Event()
        self.released = threading.Event()
        self.result = result

    def __call__(self) -> str:
        self.entered.set()
        self.released.wait(5)
        return self.result

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 5)


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    calls = Calls(at_once=2)
    yield calls
    for _ in range(1000):
        if not calls.in_thread:
            return
        await asyncio.sleep(0.001)
    pytest.fail("a call never returned")


async def test_result_comes_from_another_thread(calls: Calls) -> None:
    assert await calls.run("a", threading.current_thread, 1) is not threading.current_thread()
    assert await calls.run("a", lambda: 7, timeout_s=None) == 7


async def test_exception_reaches_the_caller_and_frees_the_key(calls: Calls) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await calls.run("a", fail, 1)
    assert await calls.run("a", lambda: 1, 1) == 1


async def test_call_waits_for_one_of_the_same_key_that_nobody_waits_for(calls: Calls) -> None:
    start, order = Gate(), []

    def stop() -> None:
        order.append(start.released.is_set())

    with pytest.raises(TimeoutError):
        await calls.run("guest", start, SOON_S)
    stopping = asyncio.create_task(calls.run("guest", stop, 5))
    await asyncio.sleep(SOON_S)
    assert order == []
    start.released.set()
    await stopping
    assert order == [True]


async def test_cancelled_caller_leaves_its_call_in_its_turn(calls: Calls) -> None:
    start = Gate()
    starting = asyncio.create_task(calls.run("guest", start, 5))
    await start.wait_entered()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert calls.in_thread == 1
    with pytest.raises(TimeoutError):
        await calls.run("guest", lambda: None, SOON_S)
    start.released.set()
    await calls.run("guest", lambda: None, 5)


async def test_call_given_up_before_its_turn_never_begins(calls: Calls) -> None:
    first, second = Gate(), Gate()
    with pytest.raises(TimeoutError):
        await calls.run("guest", first, SOON_S)
    with pytest.raises(TimeoutError):
        await calls.run("guest", second, SOON_S)
    first.released.set()
    await calls.run("guest", lambda: None, 5)
    assert not second.entered.is_set()


async def test_hung_calls_do_not_starve_other_keys(calls: Calls) -> None:
    hung = [Gate() for _ in range(5)]
    for number, gate in enumerate(hung):
        with pytest.raises(TimeoutError):
            await calls.run(f"guest {number}", gate, 0.005)
    assert calls.in_thread == 5
    assert await calls.run("healthy", lambda: "answer", 1) == "answer"
    for gate in hung:
        gate.released.set()


async def test_no_more_than_the_limit_are_waited_for_at_once(calls: Calls) -> None:
    gates = [Gate() for _ in range(3)]
    tasks = [asyncio.create_task(calls.run(f"k{n}", gate, 5)) for n, gate in enumerate(gates)]
    await gates[1].wait_entered()
    await asyncio.sleep(SOON_S)
    assert [gate.entered.is_set() for gate in gates] == [True, True, False]
    gates[0].released.set()
    await gates[2].wait_entered()
    for gate in gates:
        gate.released.set()
    assert await asyncio.gather(*tasks) == ["done"] * 3


async def test_giving_up_while_all_slots_are_taken_frees_the_key(calls: Calls) -> None:
    gates = [Gate(), Gate()]
    tasks = [asyncio.create_task(calls.run(f"k{n}", gate, 5)) for n, gate in enumerate(gates)]
    await gates[1].wait_entered()
    with pytest.raises(TimeoutError):
        await calls.run("late", lambda: None, SOON_S)
    for gate in gates:
        gate.released.set()
    await asyncio.gather(*tasks)
    assert await calls.run("late", lambda: "now", 1) == "now"


async def test_failure_that_nobody_waits_for_is_not_reported_as_forgotten(calls: Calls) -> None:
    reports: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, report: reports.append(report))
    gate = Gate()

    def fail_late() -> None:
        gate()
        raise ValueError("late")

    with pytest.raises(TimeoutError):
        await calls.run("a", fail_late, SOON_S)
    gate.released.set()
    await calls.run("a", lambda: None, 5)
    gc.collect()
    assert reports == []


async def test_threads_do_not_hold_up_the_end_of_the_process(calls: Calls) -> None:
    is_daemon: Callable[[], bool] = lambda: threading.current_thread().daemon  # noqa: E731
    assert await calls.run("a", is_daemon, 1)


async def test_calls_in_a_row_share_a_thread_that_then_ends(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpud.hypervisor.calls._IDLE_S", 30)
    threads = {await calls.run(f"k{n}", threading.current_thread, 5) for n in range(20)}
    monkeypatch.setattr("gpud.hypervisor.calls._IDLE_S", SOON_S)
    thread = await calls.run("last", threading.current_thread, 5)
    assert threads == {thread}
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive()
    assert await calls.run("a", threading.current_thread, 1) is not thread


async def test_a_thread_with_a_call_that_hangs_is_given_no_other(calls: Calls) -> None:
    gate = Gate()
    hangs = asyncio.create_task(calls.run("a", gate, 5))
    await gate.wait_entered()
    assert await calls.run("b", lambda: "answer", 1) == "answer"
    gate.released.set()
    assert await hangs == "done"


async def test_no_call_is_lost_on_a_thread_that_is_about_to_end(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpud.hypervisor.calls._IDLE_S", 0)
    for number in range(200):
        assert await calls.run("a", partial(int, number), 5) == number


async def test_a_call_without_a_thread_has_ended_for_all_who_come_after(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                await calls.run("guest", lambda: None, 5)
    assert calls.in_thread == 0
    assert await calls.run("guest", lambda: "answer", 5) == "answer"
