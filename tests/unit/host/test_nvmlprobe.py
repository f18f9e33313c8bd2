"""The child's own parts, in this process: how it asks, and what it makes of a reader's end."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pynvml
import pytest

from gpud.host import nvmlprobe
from tests.fake_nvml import library

# Other threads of the test run hold no lock that a reader needs.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

CARDS = """
card 0000:01:00.0
    name A
    uuid GPU-A
    memory_mib 1024
    nvlink 0 down
    nvlink 1 switch 0000:05:00.0
    nvlink 2 gpu 0000:02:00.0
    compute {me}
card 0000:02:00.0
    name B
    fail nvmlDeviceGetUUID GPU_IS_LOST
    fail nvmlDeviceGetMemoryInfo_v2 4242
    fail nvmlDeviceGetPciInfo_v3 UNKNOWN
    fail nvmlDeviceGetNvLinkRemotePciInfo_v2 UNKNOWN
    nvlink 0 gpu 0000:01:00.0
card 0000:03:00.0
    fail * GPU_IS_LOST
"""


@pytest.fixture(scope="module", autouse=True)
def library_loaded() -> None:
    """The dynamic linker takes a library that is loaded already for the one that pynvml names."""
    ctypes.CDLL(os.fspath(library.build() / library.SONAME))


@pytest.fixture(autouse=True)
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cards.txt").write_text(CARDS.format(me=os.getpid()))
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "cards.txt"))


def told(task: Callable[[nvmlprobe.Tell], None]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    task(lambda **more: facts.update(more))
    return facts


def test_a_reader_tells_in_its_process_what_is_told_here() -> None:
    host = told(nvmlprobe.ask_host)
    assert (host["count"], host["driver_version"]) == (3, None)

    here = [told(partial(nvmlprobe.ask_card, n)) for n in range(3)]
    assert [facts.get("fault") for facts in here] == [
        None,
        nvmlprobe._WORDS[pynvml.NVML_ERROR_UNKNOWN],
        "fell off the bus",
    ]
    assert here[0]["nvlink_peers"] == ["0000:02:00.0"]
    assert here[1]["nvlink_peers"] == []
    assert here[0]["processes"] == [
        {"pid": os.getpid(), "name": Path("/proc/self/comm").read_text().strip()}
    ]
    for facts in here:
        del facts["asking"]
    assert nvmlprobe.probe(20) == {"driver_version": None, "problem": None, "cards": here}


def test_every_error_has_words_even_an_unknown_one() -> None:
    error = pynvml.NVMLError(4242)
    assert nvmlprobe._in_words(error, "f") == "NVML error 4242 (NVMLError) from f"


def test_an_absurd_number_of_cards_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvmlprobe, "_MOST_CARDS", 2)

    answers = nvmlprobe.probe(20)

    assert answers["cards"] == []
    assert answers["problem"] == "NVML counts 3 cards, which is garbage"


def test_garbage_in_a_name_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "cards.txt").write_bytes(b"card 0000:01:00.0\nname \xff\nuuid U\nmemory_mib 1\n")
    assert told(partial(nvmlprobe.ask_card, 0))["fault"] == (
        "answered nvmlDeviceGetName with garbage"
    )


def collected(task: Callable[[nvmlprobe.Tell], None], timeout_s: float = 5) -> dict[str, Any]:
    return nvmlprobe.collect([nvmlprobe.Reader(task)], timeout_s)[0]


def test_a_reader_that_ends_early_is_told_with_what_it_was_asking() -> None:
    def exits(tell: nvmlprobe.Tell) -> None:
        tell(asking="f", name="A")
        os._exit(3)

    def fails(_: nvmlprobe.Tell) -> None:
        raise ValueError("no such thing")

    assert collected(exits) == {"name": "A", "fault": "NVML died (exit status 3) when asked f"}
    assert collected(fails) == {"fault": "could not be asked: ValueError: no such thing"}
    assert collected(lambda _: signal.raise_signal(signal.SIGTERM)) == {
        "fault": "NVML died (SIGTERM) when asked its first question"
    }


def test_a_reader_out_of_time_is_killed() -> None:
    started = time.monotonic()
    assert collected(lambda _: time.sleep(60), timeout_s=0.05) == {
        "fault": "did not answer its first question within 0.05 s"
    }
    assert time.monotonic() - started < 5


def test_a_reader_that_cannot_be_killed_is_told_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    really_kill, kept = os.kill, list[int]()
    monkeypatch.setattr(os, "kill", lambda pid, _: kept.append(pid))
    monkeypatch.setattr(nvmlprobe, "_KILL_GRACE_S", 0.01)

    facts = collected(lambda _: time.sleep(60), timeout_s=0.01)

    assert facts == {
        "fault": f"is stuck in the driver at its first question; process {kept[0]} cannot be killed"
    }
    really_kill(kept[0], signal.SIGKILL)
    os.waitpid(kept[0], 0)
