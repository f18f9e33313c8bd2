"""The real bindings, in the real child process, on a library with NVML's names (tests/fake_nvml)."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog

from gpud.host import nvml
from gpud.host.nvml import HolderProcess, Nvml, NvmlGpu, NvmlReport
from gpud.model import PciAddress
from tests.fake_nvml import library

pytestmark = pytest.mark.real_command(Path(sys.executable).name)

H100 = """
    ids 10de:2330
    subsystem 10de:16c1
    name NVIDIA H100 80GB HBM3
    uuid GPU-6a5ce2b4-0000-4000-8000-000000000001
    serial 1650000000001
    minor 3
    memory_mib 81559
    memory_used_mib 4
    persistence 1
    mig 0 0
    ecc 1 1
    ecc_uncorrected 0 2
    remapped_rows 0 1 0 0
    temperature_c 31
    power_mw 70900
    vbios 96.00.89.00.01
    inforom G520.0200.00.05
"""
RTX_4090 = """
    ids 10de:2684
    name NVIDIA GeForce RTX 4090
    uuid GPU-6a5ce2b4-0000-4000-8000-00000000000f
    memory_mib 24564
"""
HANG_ANYWHERE = "hang nvmlInitWithFlags"


def address(bus: int) -> PciAddress:
    return PciAddress(0, bus, 0, 0)


def card(bus: int, *lines: str, like: str = RTX_4090) -> str:
    return "\n".join([f"card {address(bus)}", like, *lines, ""])


Asked = Callable[..., Nvml]


@pytest.fixture
def on(tmp_path: Path, nvml_library: Path) -> Asked:
    """NVML on a host with these cards."""

    def start(
        *text: str,
        timeout_s: float = 20,
        at: Path = nvml_library,
        proc: Path = Path("/proc"),
    ) -> Nvml:
        file = tmp_path / "cards.txt"
        file.write_bytes("\n".join(("driver_version 550.90.07", *text)).encode("latin-1"))
        env = {"LD_LIBRARY_PATH": str(at), "FAKE_NVML": str(file)}
        return Nvml(timeout_s, env=env, proc=proc)

    return start


async def test_all_that_a_data_centre_card_tells(on: Asked) -> None:
    me = os.getpid()
    links = "nvlink 0 switch 0000:05:00.0", "nvlink 1 down", "nvlink 2 switch 0000:05:00.0"
    report = await on(
        card(0x19, *links, f"compute {me}", f"graphics {me}", "compute 4194305", like=H100)
    ).report()

    assert report == NvmlReport(
        gpus=(
            NvmlGpu(
                address=address(0x19),
                name="NVIDIA H100 80GB HBM3",
                uuid="GPU-6a5ce2b4-0000-4000-8000-000000000001",
                serial="1650000000001",
                vram_mib=81559,
                pci_ids="10de:2330",
                subsystem_ids="10de:16c1",
                minor=3,
                ecc_uncorrected=0,
                ecc_uncorrected_lifetime=2,
                memory_used_mib=4,
                processes=(
                    HolderProcess(me, Path("/proc/self/comm").read_text().strip()),
                    HolderProcess(4194305, "unknown"),
                ),
                nvswitch=True,
                persistence=True,
                temperature_c=31,
                power_w=70,
                vbios="96.00.89.00.01",
                inforom="G520.0200.00.05",
            ),
        ),
        driver_version="550.90.07",
    )
    assert report.gpus[0].unhealthy == ()


async def test_cards_are_told_in_order_with_what_is_wrong_with_each(on: Asked) -> None:
    report = await on(
        card(6, "mig 0 1", "ecc 1 0", "ecc_uncorrected 2 2"),
        card(5, "retired_pages 3 4", "retirement_pending 1", "mig 1 1", "ecc_uncorrected 1 1"),
        card(7, "remapped_rows 0 9 1 1"),
        card(4, "nvlink 0 gpu 0000:03:00.0", "nvlink 1 gpu 0000:03:00.0", "nvlink 2 down"),
        card(3),
    ).report()

    assert (report.problem, report.unplaced) == (None, ())
    plain, linked, pages, settings, rows = report.gpus
    assert [gpu.address.bus for gpu in report.gpus] == [3, 4, 5, 6, 7]
    assert plain == NvmlGpu(
        address=address(3),
        name="NVIDIA GeForce RTX 4090",
        uuid="GPU-6a5ce2b4-0000-4000-8000-00000000000f",
        vram_mib=24564,
        pci_ids="10de:2684",
        subsystem_ids="0000:0000",
        memory_used_mib=0,
    )
    assert linked.nvlink_peers == (address(3),)
    assert not linked.nvswitch
    assert pages.retired_pages == 7
    assert pages.mig_enabled
    assert pages.unhealthy == (
        "1 uncorrected memory error",
        "memory pages wait to be retired: reset it",
    )
    assert (settings.mig_enabled, settings.ecc_pending) == (True, True)
    assert settings.unhealthy == ("2 uncorrected memory errors",)
    assert rows.unhealthy == (
        "memory rows wait to be remapped: reset it",
        "a memory row could not be remapped: replace the card",
    )


FAULTS = {
    "GPU_IS_LOST": "fell off the bus",
    "RESET_REQUIRED": "needs a reset before it can be used again",
    "UNKNOWN": "the NVIDIA driver does not tell why it failed: see dmesg for Xid",
    "NO_PERMISSION": "this user may not ask it: see the mode of /dev/nvidia*",
    "TIMEOUT": "the NVIDIA driver gave up waiting for it",
    "INSUFFICIENT_POWER": "its external power cables are not attached properly",
    "IRQ_ISSUE": "its interrupts do not arrive",
    "CORRUPTED_INFOROM": "its infoROM is corrupted",
    "GPU_NOT_FOUND": "the NVIDIA driver finds no GPU there",
    "OPERATING_SYSTEM": "the operating system keeps NVML from it",
    "NOT_SUPPORTED": "does not support nvmlDeviceGetUUID",
    "FUNCTION_NOT_FOUND": "the NVIDIA driver is too old: it lacks nvmlDeviceGetUUID",
    "IN_USE": "NVML error 19 (NVMLError_InUse) from nvmlDeviceGetUUID",
    "4242": "NVML error 4242 (NVMLError) from nvmlDeviceGetUUID",
}


async def test_each_error_is_told_in_words_and_leaves_the_other_answers(on: Asked) -> None:
    report = await on(
        *(card(bus, f"fail nvmlDeviceGetUUID {code}") for bus, code in enumerate(FAULTS))
    ).report()

    assert [gpu.fault for gpu in report.gpus] == list(FAULTS.values())
    assert [gpu.unhealthy for gpu in report.gpus] == [(words,) for words in FAULTS.values()]
    assert {(gpu.name, gpu.uuid, gpu.vram_mib) for gpu in report.gpus} == {
        ("NVIDIA GeForce RTX 4090", None, 24564)
    }


async def test_one_bad_card_hides_none_of_the_others(on: Asked) -> None:
    started = time.monotonic()
    report = await on(
        card(1),
        card(2, "hang nvmlDeviceGetPowerUsage"),
        card(3, "crash nvmlDeviceGetTotalEccErrors", "crash nvmlDeviceGetName"),
        card(4, "fail * GPU_IS_LOST"),
        card(5, "hang nvmlDeviceGetHandleByIndex_v2"),
        card(6, like="name \xff\xfe\nmemory_mib 1\nuuid GPU-1"),
        card(
            7, "fail nvmlDeviceGetTemperature GPU_IS_LOST", "fail nvmlDeviceGetPowerUsage UNKNOWN"
        ),
        card(8),
        timeout_s=0.5,
    ).report()

    assert time.monotonic() - started < 5
    assert report.problem is None
    assert {gpu.address.bus: gpu.fault for gpu in report.gpus} == {
        1: None,
        2: "did not answer nvmlDeviceGetPowerUsage within 0.5 s",
        3: "NVML died (SIGSEGV) when asked nvmlDeviceGetName",
        6: "answered nvmlDeviceGetName with garbage",
        7: "fell off the bus",
        8: None,
    }
    assert report.gpus[1].uuid == "GPU-6a5ce2b4-0000-4000-8000-00000000000f"  # told before it hung
    assert report.gpus[3].vram_mib == 1
    assert report.unplaced == (
        "card 3: fell off the bus",
        "card 4: did not answer nvmlDeviceGetHandleByIndex within 0.5 s",
    )


def driver_lists(proc: Path, *buses: int) -> None:
    for bus in buses:
        (proc / "driver/nvidia/gpus" / str(address(bus))).mkdir(parents=True)


async def test_lost_cards_are_placed_where_the_driver_lists_cards_that_did_not_answer(
    on: Asked, tmp_path: Path
) -> None:
    driver_lists(tmp_path, 1, 2, 3)
    lost, dead = "fail * GPU_IS_LOST", "fail * RESET_REQUIRED"
    report = await on(card(1, lost), card(2), card(3, dead), proc=tmp_path).report()

    either = "fell off the bus or needs a reset before it can be used again"
    assert [gpu.fault for gpu in report.gpus] == [either, None, either]
    assert [gpu.address.bus for gpu in report.gpus] == [1, 2, 3]
    assert report.unplaced == ()


async def test_lost_cards_are_not_placed_by_guessing(on: Asked, tmp_path: Path) -> None:
    driver_lists(tmp_path, 1, 2, 3)
    report = await on(card(1, "fail * GPU_IS_LOST"), card(2), proc=tmp_path).report()

    assert [gpu.address.bus for gpu in report.gpus] == [2]
    assert report.unplaced == ("card 0: fell off the bus",)


@pytest.mark.real_command("gcc")
async def test_functions_that_an_older_driver_lacks(on: Asked) -> None:
    older = library.build(missing=["nvmlDeviceGetRemappedRows", "nvmlDeviceGetNvLinkState"])
    oldest = library.build(missing=[(lacks := "nvmlDeviceGetComputeRunningProcesses_v3")])
    gpu = (await on(card(1, "nvlink 0 down", like=H100), at=older).report()).gpus[0]
    unusable = (await on(card(1), at=oldest).report()).gpus[0]

    assert (gpu.fault, gpu.remap_pending, gpu.inforom) == (None, False, "G520.0200.00.05")
    assert unusable.fault == f"the NVIDIA driver is too old: it lacks {lacks}"


PROBLEMS = {
    "fail nvmlInitWithFlags DRIVER_NOT_LOADED": "no NVIDIA driver is loaded",
    "fail nvmlInitWithFlags LIB_RM_VERSION_MISMATCH": (
        "the NVIDIA kernel driver and library differ in version: reboot"
    ),
    "fail nvmlDeviceGetCount_v2 UNKNOWN": FAULTS["UNKNOWN"],
    "crash nvmlInitWithFlags": "NVML died (SIGSEGV) when asked nvmlInitWithFlags",
    "hang nvmlDeviceGetCount_v2": "did not answer nvmlDeviceGetCount within 0.3 s",
}


@pytest.mark.parametrize("failure", PROBLEMS)
async def test_a_problem_of_the_whole_is_told(on: Asked, failure: str) -> None:
    report = await on(failure, card(1), timeout_s=0.3).report()

    assert (report.problem, report.gpus) == (PROBLEMS[failure], ())


async def test_no_library(on: Asked, tmp_path: Path) -> None:
    (tmp_path / library.SONAME).write_text("not an ELF file, so the dynamic linker gives up here")
    report = await on(card(1), at=tmp_path).report()

    assert report == NvmlReport(problem="NVML is not installed: there is no libnvidia-ml.so.1")


async def test_a_driver_without_cards_is_no_problem(on: Asked) -> None:
    gone = "while_driver no-such-driver"
    assert await on(card(1, gone)).report() == NvmlReport(driver_version="550.90.07")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("print('Segmentation fault')", "NVML's answers are garbage"),
        ("print('[]')", "NVML's answers are garbage"),
        ("import no_such_bindings", "NVML could not be asked: .* ended with status 1: .*bindings'"),
        ("import time; time.sleep(60)", "NVML could not be asked: .* did not end within 0.3 s .*"),
    ],
)
async def test_a_probe_that_itself_fails_is_told(
    on: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, problem: str
) -> None:
    (tmp_path / "probe.py").write_text(script)
    monkeypatch.setattr(nvml, "_PROBE", tmp_path / "probe.py")
    monkeypatch.setattr(nvml, "_START_S", 0.1)

    report = await on(timeout_s=0.1).report()

    assert re.fullmatch(problem, report.problem or "", re.DOTALL)
    assert report.gpus == ()


@asynccontextmanager
async def hanging(asker: Nvml) -> AsyncIterator[asyncio.Task[NvmlReport]]:
    """A report under way whose reader hangs inside NVML."""
    task = asyncio.create_task(asker.report())
    await until(lambda: len(asker._readers()) == 2)
    yield task
    task.cancel()
    await asyncio.wait([task])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_closing_kills_the_running_probe_and_keeps_new_ones_out(
    on: Asked, tmp_path: Path
) -> None:
    asker = on(HANG_ANYWHERE)
    async with hanging(asker) as waiting:
        async with asker.closed():
            assert asker._readers() == []
            second = asyncio.create_task(asker.report())
            async with asker.closed():
                pass
            await asyncio.sleep(0.02)
            assert asker._readers() == []  # one who closed it is still inside
            assert not waiting.done()
            (tmp_path / "cards.txt").write_text(card(1))

        assert [gpu.address for gpu in (await waiting).gpus] == [address(1)]
        assert await second == await waiting


async def test_who_waited_does_not_ask_when_it_is_closed_again_at_once(on: Asked) -> None:
    asker, inside, leave = on(HANG_ANYWHERE), asyncio.Event(), asyncio.Event()

    async def one_leaves() -> None:
        async with asker.closed():
            inside.set()
            await leave.wait()

    async def another_comes() -> None:
        await leave.wait()
        async with asker.closed():
            await asyncio.sleep(0.02)
            assert asker._probe is None

    leaving = asyncio.create_task(one_leaves())
    await inside.wait()
    coming = asyncio.create_task(another_comes())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(asker.report())
    await asyncio.sleep(0)
    leave.set()
    await asyncio.gather(leaving, coming)
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_a_cancelled_report_leaves_no_process(on: Asked) -> None:
    asker = on(HANG_ANYWHERE)
    async with hanging(asker) as waiting:
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        await until(lambda: asker._readers() == [])


async def test_closing_opens_again_after_an_error(on: Asked) -> None:
    asker = on(card(1))
    with pytest.raises(RuntimeError):
        async with asker.closed():
            raise RuntimeError

    assert len((await asker.report()).gpus) == 1


def reader_in(proc: Path, asker: Nvml, pid: int, state: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "stat").write_text(f"{pid} ({asker._comm}) {state} 1 {pid} {pid} 0 -1")


async def test_no_probe_is_added_to_many_that_are_stuck(on: Asked, tmp_path: Path) -> None:
    asker = on(card(1), proc=tmp_path / "proc")
    for pid in range(100, 116):
        reader_in(tmp_path / "proc", asker, pid, "D")

    assert (await asker.report()).problem == "16 probes are stuck in the driver: reboot"


async def test_closing_waits_for_killed_readers_but_not_for_ever(
    on: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "_GONE_S", 0.05)
    asker = on(proc=tmp_path / "proc")
    reader_in(tmp_path / "proc", asker, 100, "D")
    reader_in(tmp_path / "proc", asker, 101, "Z")

    with structlog.testing.capture_logs() as logs:
        async with asker.closed():
            pass

    assert [(log["log_level"], log["pids"]) for log in logs] == [("warning", [100])]


async def test_the_daemon_itself_never_loads_the_bindings() -> None:
    code = "import sys, gpud.host.nvml; sys.exit('pynvml' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=Path.cwd())

    assert await process.wait() == 0
