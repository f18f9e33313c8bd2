"""NVML that hangs, dies or finds something, through the real bindings, when cards come back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpud.host.nvml import Nvml
from gpud.lifecycle import cleaning
from gpud.model import Status, Step
from tests.faults import FaultLog
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Hold
from tests.unit.lifecycle.test_cards import GPU, IDLE, NVML_OF, OTHER, sellable

pytestmark = pytest.mark.real_command(Path(sys.executable).name, "gcc")

FAULTS = {
    "hangs": "hang nvmlDeviceGetMemoryInfo_v2",
    "dies": "crash nvmlDeviceGetMemoryInfo_v2",
    "loses the card": "fail * GPU_IS_LOST",
    "wants a reset": "fail * RESET_REQUIRED",
    "finds memory errors": "ecc_uncorrected 3 3",
    "finds a process": "compute 1",
}

Say = Callable[[str], None]


@pytest.fixture
def say(tmp_path: Path) -> Say:
    """Has NVML tell this of the first card, and of the second that all is well."""

    def say(told: str) -> None:
        text = NVML_OF.format(GPU, "0", told) + NVML_OF.format(OTHER, *IDLE)
        (tmp_path / "nvml.txt").write_text(text)

    return say


@pytest.fixture
def nvml(tmp_path: Path, nvml_library: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> Nvml:
    monkeypatch.setattr(cleaning, "_ASK_AGAIN_S", 0)
    say("persistence 1")
    env = {"LD_LIBRARY_PATH": str(nvml_library), "FAKE_NVML": str(tmp_path / "nvml.txt")}
    return Nvml(0.7, env)


@pytest.mark.parametrize("killed_in", [None, Step.CLEAN_GPUS, Step.RETURN_GPUS])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_card_that_nvml_does_not_vouch_for_is_kept_and_the_other_sells_on(
    start_gpud: StartGpud, nvml: Nvml, say: Say, fault_log: FaultLog, fault: str, killed_in: Step | None
) -> None:  # fmt: skip
    hold = Hold(killed_in or Step.RETURN_GPUS, after=False)
    gpud = await start_gpud(hold, nvml=nvml)
    assert await sellable(gpud) == [GPU, OTHER]
    instance = await gpud.running()
    say(FAULTS[fault])
    await gpud.store.request_delete(instance.upstream_id)
    await hold.reached.wait()
    with fault_log.recovering(f"NVML {fault}") as findings:
        if killed_in is None:
            hold.open.set()
        else:
            await gpud.kill()
            gpud = await start_gpud(nvml=nvml)
        assert (await gpud.ended(instance)).status is Status.TERMINATED
        assert list(gpud.store.quarantines) == [GPU]
        assert await sellable(gpud) == [OTHER]
        other = await gpud.running("on the other card")
        findings.extend(await gpud.findings())
    await gpud.deleted(other)

    say("persistence 1")
    assert await gpud.cleaner.release(GPU)
    await gpud.inventory._ask(nvml)  # what it does once a minute
    assert await sellable(gpud) == [GPU, OTHER]
