"""Asks NVML about every card and prints what it said as one JSON document.

NVML may hang, crash, or do either for a single card. So this runs as a process of its own
(``python nvmlprobe.py TIMEOUT_S NAME``), and forks one reader for the host and then one for each card: a
reader tells each answer as it gets it, and one that hangs or dies costs nothing but its own card's
remaining answers. Per NVML's reference, ``nvmlInit`` initialises no GPU and
``nvmlDeviceGetHandleByIndex_v2`` only the one it is asked for.

The only module that imports pynvml. It imports little else, since it is started again and again, and
nothing of gpud, since it is run by its path. The oldest driver it understands is R510 (2022).
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias

import pynvml

# pynvml has no types.
Answer: TypeAlias = Any
Handle: TypeAlias = Any
Ask: TypeAlias = Callable[..., Answer]
Tell: TypeAlias = Callable[..., None]

_MOST_CARDS: Final = 64  # more is garbage, and each costs a process
_KILL_GRACE_S: Final = 1.0
_READ_BYTES: Final = 65536

_WORDS: Final = {
    pynvml.NVML_ERROR_NOT_SUPPORTED: "does not support {question}",
    pynvml.NVML_ERROR_NO_PERMISSION: "this user may not ask it: see the mode of /dev/nvidia*",
    pynvml.NVML_ERROR_INSUFFICIENT_POWER: "its external power cables are not attached properly",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "no NVIDIA driver is loaded",
    pynvml.NVML_ERROR_TIMEOUT: "the NVIDIA driver gave up waiting for it",
    pynvml.NVML_ERROR_IRQ_ISSUE: "its interrupts do not arrive",
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "NVML is not installed: there is no libnvidia-ml.so.1",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "the NVIDIA driver is too old: it lacks {question}",
    pynvml.NVML_ERROR_CORRUPTED_INFOROM: "its infoROM is corrupted",
    pynvml.NVML_ERROR_GPU_IS_LOST: "fell off the bus",
    pynvml.NVML_ERROR_RESET_REQUIRED: "needs a reset before it can be used again",
    pynvml.NVML_ERROR_OPERATING_SYSTEM: "the operating system keeps NVML from it",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "the NVIDIA kernel driver and library differ in version: reboot"
    ),
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "the NVIDIA driver finds no GPU there",
    pynvml.NVML_ERROR_UNKNOWN: "the NVIDIA driver does not tell why it failed: see dmesg for Xid",
}
_NOT_SUPPORTED: Final = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED})
_NO_ANSWER: Final = _NOT_SUPPORTED | {
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_DATA,
    pynvml.NVML_ERROR_NOT_FOUND,
}
"""Errors that say nothing bad of a card: it has no such thing, or the driver is too old for it."""
_NO_LINK: Final = _NO_ANSWER | {pynvml.NVML_ERROR_INVALID_ARGUMENT}
_NEEDED: Final[frozenset[int]] = frozenset()


class Interview:
    """Questions to NVML, each announced before it is asked, and the first fault that came up."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self._faulty = False

    def ask(self, question: Ask, *arguments: object, fine: frozenset[int] = _NO_ANSWER) -> Answer:
        """The answer; None when there is none, which is a fault unless the error is ``fine``."""
        self.tell(asking=question.__name__)
        try:
            return question(*arguments)
        except pynvml.NVMLError as error:
            if error.value not in fine:
                self._fault(_in_words(error, question.__name__))
        except UnicodeDecodeError:
            self._fault(f"answered {question.__name__} with garbage")
        return None

    def _fault(self, words: str) -> None:
        if not self._faulty:
            self._faulty = True
            self.tell(fault=words)


def ask_host(tell: Tell) -> None:
    """What NVML knows of the host as a whole."""
    ask = Interview(tell).ask
    ask(pynvml.nvmlInitWithFlags, pynvml.NVML_INIT_FLAG_NO_GPUS, fine=_NEEDED)
    tell(driver_version=ask(pynvml.nvmlSystemGetDriverVersion))
    tell(count=ask(pynvml.nvmlDeviceGetCount, fine=_NEEDED) or 0)


def ask_card(index: int, tell: Tell) -> None:
    """What NVML knows of one card: who it is first, then how it fares."""
    ask = Interview(tell).ask
    ask(pynvml.nvmlInitWithFlags, pynvml.NVML_INIT_FLAG_NO_GPUS, fine=_NEEDED)
    card = ask(pynvml.nvmlDeviceGetHandleByIndex, index, fine=_NEEDED)
    if card is None:
        return
    pci = ask(pynvml.nvmlDeviceGetPciInfo_v3, card, fine=_NEEDED)
    if pci is not None:
        tell(address=_address(pci))
        tell(pci_ids=_ids(pci.pciDeviceId), subsystem_ids=_ids(pci.pciSubSystemId))
    tell(name=ask(pynvml.nvmlDeviceGetName, card, fine=_NEEDED))
    tell(uuid=ask(pynvml.nvmlDeviceGetUUID, card, fine=_NEEDED))
    tell(serial=ask(pynvml.nvmlDeviceGetSerial, card))
    tell(minor=ask(pynvml.nvmlDeviceGetMinorNumber, card))
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, card, pynvml.nvmlMemory_v2, fine=_NEEDED)
    if memory is not None:
        tell(memory_bytes=memory.total, memory_used_bytes=memory.used)
    tell(mig=ask(pynvml.nvmlDeviceGetMigMode, card))
    tell(processes=_processes(ask, card))
    _ask_memory_health(ask, card, tell)
    _ask_nvlinks(ask, card, tell)
    tell(persistence=ask(pynvml.nvmlDeviceGetPersistenceMode, card))
    tell(temperature_c=ask(pynvml.nvmlDeviceGetTemperature, card, pynvml.NVML_TEMPERATURE_GPU))
    tell(power_mw=ask(pynvml.nvmlDeviceGetPowerUsage, card))
    tell(vbios=ask(pynvml.nvmlDeviceGetVbiosVersion, card))
    tell(inforom=ask(pynvml.nvmlDeviceGetInforomImageVersion, card))


def _ask_memory_health(ask: Ask, card: Handle, tell: Tell) -> None:
    tell(ecc=ask(pynvml.nvmlDeviceGetEccMode, card))
    uncorrected = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    for fact, counter in (
        ("ecc_uncorrected", pynvml.NVML_VOLATILE_ECC),
        ("ecc_uncorrected_lifetime", pynvml.NVML_AGGREGATE_ECC),
    ):
        tell(**{fact: ask(pynvml.nvmlDeviceGetTotalEccErrors, card, uncorrected, counter)})
    # Cards before Ampere retire pages, later ones remap rows.
    retired = [
        ask(pynvml.nvmlDeviceGetRetiredPages, card, cause)
        for cause in range(pynvml.NVML_PAGE_RETIREMENT_CAUSE_COUNT)
    ]
    tell(retired_pages=None if None in retired else sum(map(len, retired)))
    tell(retirement_pending=ask(pynvml.nvmlDeviceGetRetiredPagesPendingStatus, card))
    tell(remapped_rows=ask(pynvml.nvmlDeviceGetRemappedRows, card))


def _ask_nvlinks(ask: Ask, card: Handle, tell: Tell) -> None:
    peers: set[str] = set()
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        active = ask(pynvml.nvmlDeviceGetNvLinkState, card, link, fine=_NO_LINK)
        if active is None:
            break  # past its last one
        if not active:
            continue
        kind = ask(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, card, link)
        if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            tell(nvswitch=True)
        elif kind == pynvml.NVML_NVLINK_DEVICE_TYPE_GPU:
            peer = ask(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, card, link)
            peers |= {_address(peer)} if peer is not None else set()
    tell(nvlink_peers=sorted(peers))


def _processes(ask: Ask, card: Handle) -> list[dict[str, Any]]:
    found = [
        process
        for question in (
            pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
            pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
        )
        for process in ask(question, card, fine=_NOT_SUPPORTED) or ()
    ]
    return [{"pid": pid, "name": _comm(pid)} for pid in sorted({each.pid for each in found})]


def _comm(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:  # noqa: PTH123 - pathlib is heavy
            return file.read().strip()
    except OSError:  # ended meanwhile, or hidden from this user
        return "unknown"


def _address(pci: Answer) -> str:
    return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"


def _ids(combined: int) -> str:
    return f"{combined & 0xFFFF:04x}:{combined >> 16:04x}"


def _in_words(error: pynvml.NVMLError, question: str) -> str:
    words = _WORDS.get(error.value)
    if words is None:
        return f"NVML error {error.value} ({type(error).__name__}) from {question}"
    return words.format(question=question)


class Reader:
    """A forked process that tells facts through a pipe until it ends or is killed.

    Attributes:
        facts: What it told, with a ``fault`` when it did not get to its end.
    """

    def __init__(self, task: Callable[[Tell], None]) -> None:
        self.facts: dict[str, Any] = {}
        self._data = b""
        self._over = False
        self.pipe, write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _run(task, write_end)
        os.close(write_end)

    def read(self) -> bool:
        """Take what has come; False at the end."""
        data = os.read(self.pipe, _READ_BYTES)
        self._data += data
        self._over = not data
        return not self._over

    def kill(self) -> None:
        """End it, if it has not ended by itself."""
        os.kill(self._pid, signal.SIGKILL)

    def conclude(self, timeout_s: float) -> None:
        """Reap it and sum up ``facts``."""
        status = self._reap()
        *lines, _ = self._data.split(b"\n")
        for line in lines:
            self.facts |= json.loads(line)
        asking = self.facts.pop("asking", "its first question")
        if self.facts.pop("done", False):
            return
        if status is None:
            fault = f"is stuck in the driver at {asking}; process {self._pid} cannot be killed"
        elif self._over:
            fault = f"NVML died ({_ending(status)}) when asked {asking}"
        else:
            fault = f"did not answer {asking} within {timeout_s:g} s"
        self.facts["fault"] = fault

    def _reap(self) -> int | None:
        deadline = time.monotonic() + _KILL_GRACE_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.002)
        return None


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _run(  # pragma: no cover - in the fork, where coverage does not look
    task: Callable[[Tell], None], pipe: int
) -> NoReturn:
    # A reader that cannot be killed must not keep the prober's own output open.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)

    def tell(**facts: object) -> None:
        os.write(pipe, json.dumps(facts).encode() + b"\n")

    try:
        task(tell)
    except Exception as error:  # noqa: BLE001 - whatever it is, this is where it is told
        tell(fault=f"could not be asked: {type(error).__name__}: {error}")
    tell(done=True)
    os._exit(0)


def collect(readers: Iterable[Reader], timeout_s: float) -> list[dict[str, Any]]:
    """The facts of all ``readers``, none of which outlives the time but those stuck in the kernel."""
    readers = list(readers)
    deadline = time.monotonic() + timeout_s
    unfinished = {reader.pipe: reader for reader in readers}
    while unfinished and (left_s := deadline - time.monotonic()) > 0:
        for pipe in select.select(unfinished, (), (), left_s)[0]:
            if not unfinished[pipe].read():
                del unfinished[pipe]
    for reader in readers:
        reader.kill()
    for reader in readers:
        reader.conclude(timeout_s)
    return [reader.facts for reader in readers]


def probe(timeout_s: float) -> dict[str, Any]:
    """Everything NVML tells within ``timeout_s`` for the host, and as much again for all cards."""
    host = collect([Reader(ask_host)], timeout_s)[0]
    count = host.get("count", 0)
    if count > _MOST_CARDS:
        host |= {"fault": f"NVML counts {count} cards, which is garbage"}
        count = 0
    cards = [Reader(partial(ask_card, index)) for index in range(count)]
    return {
        "driver_version": host.get("driver_version"),
        "problem": host.get("fault"),
        "cards": collect(cards, timeout_s),
    }


if __name__ == "__main__":  # pragma: no cover - run by its path, as a process of its own
    with open("/proc/self/comm", "w") as own_name:  # noqa: PTH123
        own_name.write(sys.argv[2])  # readers inherit it, so gpud finds those it left behind
    sys.stdout.write(json.dumps(probe(float(sys.argv[1]))))
