"""A card in words and as JSON."""

from __future__ import annotations

import json

from gpud.inventory import pciclass
from tests.unit.inventory.parts import AUDIO, NVME, at, audio, facts, gpu, nvml, only, pci, record


def test_the_summary_tells_one_reason_of_each_kind() -> None:
    strangers = [pci(bus, 0xA808, NVME, vendor=0x144D, iommu_group=59) for bus in ("3c", "3d")]
    card = only(facts(gpu("3b", driver=None), *strangers))
    assert card.summary == (
        "foreign device in IOMMU group 59: 0000:3c:00.0 (144d:a808, NVMe drive, no driver)"
        " (and 1 more); no driver"
    )
    assert len(card.why_not) == 3


def test_the_summary_of_a_card_for_sale_is_empty() -> None:
    assert only(facts(gpu("3b"))).summary == ""


def test_json_tells_all_there_is() -> None:
    seen = nvml(
        "3b",
        serial="165",
        temperature_c=31,
        power_w=70,
        memory_used_mib=4,
        ecc_uncorrected=0,
        retired_pages=2,
        vbios="95.02",
        inforom="G002",
        nvlink_peers=(at("3c"),),
    )
    told = facts(gpu("3b", numa_node=1), audio("3b:00.1"), seen=(seen,))
    card = only(told, record(claimed={"3b": "i-1"}))
    assert json.loads(json.dumps(card.as_json())) == {
        "address": "0000:3b:00.0",
        "ids": "10de:2684 10de:16c1",
        "state": "in_use",
        "summary": "instance i-1",
        "why_not": [],
        "holder": "i-1",
        "name": "NVIDIA GeForce RTX 4090",
        "gpu_type": "rtx_4090",
        "vram_mib": 24564,
        "uuid": "GPU-0000003b",
        "serial": "165",
        "driver": "nvidia",
        "numa_node": 1,
        "iommu_group": 59,
        "group_members": [
            {
                "address": "0000:3b:00.0",
                "ids": "10de:2684",
                "class": "VGA controller",
                "driver": "nvidia",
                "iommu_group": 59,
            },
            {
                "address": "0000:3b:00.1",
                "ids": "10de:22ba",
                "class": "audio device",
                "driver": "snd_hda_intel",
                "iommu_group": 59,
            },
        ],
        "functions": ["0000:3b:00.0", "0000:3b:00.1"],
        "nvlink_peers": ["0000:3c:00.0"],
        "pcie_peers": [],
        "bundle": None,
        "nvlink": None,
        "stand_in": False,
        "temperature_c": 31,
        "power_w": 70,
        "memory_used_mib": 4,
        "ecc_uncorrected": 0,
        "retired_pages": 2,
        "retirement_pending": False,
        "remap_pending": False,
        "vbios": "95.02",
        "inforom": "G002",
    }


def test_a_card_without_a_name_has_that_of_its_type() -> None:
    assert only(facts(gpu("3b"))).name == "NVIDIA RTX 4090"


def test_pci_classes_in_words() -> None:
    assert pciclass.in_words(AUDIO) == "audio device"
    assert pciclass.in_words(0x0C8000) == "serial bus controller"
    assert pciclass.in_words(0xFF0000) == "device of class ff00"
