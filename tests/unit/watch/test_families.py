"""What NVML measured of idle cards, as Prometheus gets it."""

from __future__ import annotations

from gpud.watch.families import of_cards
from tests.unit.inventory.parts import facts, gpu, nvml, only


def test_the_health_of_an_idle_card_is_told_in_base_units() -> None:
    seen = nvml(
        "3b", temperature_c=31, power_w=70, memory_used_mib=4, ecc_uncorrected=2,
        retired_pages=3, remap_pending=True,
    )  # fmt: skip
    card = only(facts(gpu("3b"), seen=(seen,)))
    told = {sample.name: sample for family in of_cards([card]) for sample in family.samples}
    values = {
        name.removeprefix("gpud_gpu_"): sample.value
        for name, sample in told.items()
        if set(sample.labels) == {"gpu"}
    }
    assert values == {
        "temperature_celsius": 31,
        "power_watts": 70,
        "memory_used_bytes": 4 * 2**20,
        "ecc_uncorrected_errors": 2,
        "retired_pages": 3,
        "retirement_pending": 0,
        "row_remap_pending": 1,
    }
    assert all(
        sample.labels.get("gpu", "0000:3b:00.0") == "0000:3b:00.0" for sample in told.values()
    )
    assert told["gpud_gpu_not_sold"].labels["reason"] == "unhealthy"
    assert told["gpud_gpu_info"].labels["gpu_type"] == card.gpu_type


def test_of_a_card_that_nvml_does_not_see_nothing_is_told() -> None:
    card = only(facts(gpu("3b", driver="vfio-pci")))
    names = {sample.name for family in of_cards([card]) for sample in family.samples}
    assert "gpud_gpu_temperature_celsius" not in names
    assert "gpud_gpu_info" in names
