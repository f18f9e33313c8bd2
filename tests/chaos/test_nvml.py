"""NVML that hangs, dies or finds something, through the real bindings, when cards come back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpud.host.nvml import Nvml
from gpud.lifecycle import cleaning
from gpud.model import Status, Step
from tests.faults import FaultLog
from tests.unit.conftest import NvmlOn
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

WELL = "persistence 1"


def of_both(told: str) -> str:
    """NVML tells this of the first card, and of the second that all is well."""
    return NVML_OF.format(GPU, "0", told) + NVML_OF.format(OTHER, *IDLE)


@pytest.fixture
def nvml(nvml_on: NvmlOn, monkeypatch: pytest.MonkeyPatch) -> Nvml:
    monkeypatch.setattr(cleaning, "_ASK_AGAIN_S", 0)
    return nvml_on(of_both(WELL), timeout_s=0.7)


@pytest.mark.parametrize("killed_in", [None, Step.CLEAN_GPUS, Step.RETURN_GPUS])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_card_that_nvml_does_not_vouch_for_is_kept_and_the_other_sells_on(
    start_gpud: StartGpud,
    nvml: Nvml,
    nvml_on: NvmlOn,
    fault_log: FaultLog,
    fault: str,
    killed_in: Step | None,
) -> None:
    hold = Hold(killed_in or Step.RETURN_GPUS, after=False)
    gpud = await start_gpud(hold, nvml=nvml)
    assert await sellable(gpud) == [GPU, OTHER]
    instance = await gpud.running()
    nvml_on(of_both(FAULTS[fault]))
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

    nvml_on(of_both(WELL))
    assert await gpud.cleaner.release(GPU)
    await gpud.inventory._ask(nvml)  # what it does once a minute
    assert await sellable(gpud) == [GPU, OTHER]
