"""The udev rules against the recorded servers: whatever drives a card's function, gpud may unbind it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from gpud.host.pci import VFIO_PCI
from tests.unit.fakes import recorded_host

RULES = Path(__file__).parents[2] / "systemd/71-gpud.rules"
NVIDIA = "10de"
DRIVER = re.compile(r'DEVPATH=="/bus/pci/drivers/([\w-]+)", TAG\+="gpud"$', re.MULTILINE)


def test_every_driver_of_a_card_on_the_recorded_servers_is_in_the_rules() -> None:
    texts = [(directory / "host.yaml").read_text() for directory in recorded_host.HOSTS.iterdir()]
    drivers = {
        function["driver"]
        for text in texts
        for function in yaml.safe_load(text)["functions"]
        if function["ids"].startswith(NVIDIA) and "driver" in function
    }
    assert {"nvidia", "nvidia-nvswitch", "snd_hda_intel", "xhci_hcd", "nvidia-gpu"} <= drivers
    assert drivers <= set(allowed())


def test_the_drivers_that_gpud_itself_or_a_bare_linux_gives_a_card_are_in_the_rules() -> None:
    assert {VFIO_PCI, "nouveau"} <= set(allowed())


def allowed() -> list[str]:
    return DRIVER.findall(RULES.read_text())
