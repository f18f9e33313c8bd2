"""What the emulated GPU server is made of: its cards, and QEMU's arguments for them.

NVMe controllers play the GPUs: like a GPU they reset themselves (FLR), reach memory by DMA and interrupt
by MSI-X, and the kernel of a cloud image has their driver built in. A guest that reads and writes the
disk behind such a "GPU" has sent data both ways through the IOMMU, and the outside can see it.

    slot  port     functions                                   IOMMU group
    10    00:10.0  01:00.0 card, 01:00.1 USB companion         of its own
    11    00:11.0  02:00.0 card                                of its own
    12    00:12.0  03:00.0 card                                of its own
    13    00:13.0  04:00.0 card         without ACS, like a    both ports and what is
          00:13.1  05:00.0 network      desktop's board        below them
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CARD_IDS = "1b36:0010"
COMPANION_IDS = "1b36:000d"
SUBSYSTEM_IDS = "1af4:1100"
FOREIGN_IDS = "8086:10d3"
CARD_DRIVER = "nvme"
COMPANION_DRIVER = "xhci_hcd"
FOREIGN_DRIVER = "e1000e"

DISK_MIB = 16


@dataclass(frozen=True)
class Card:
    """A card for sale.

    Attributes:
        name: The id of its QEMU device, and the serial number of its disk.
        address: Where the server's Linux finds it.
        port: The root port it is in.
        companion: Its second function.
    """

    name: str
    address: str
    port: str
    companion: str | None = None


FIRST = Card("card1", "0000:01:00.0", "port1", companion="0000:01:00.1")
SECOND = Card("card2", "0000:02:00.0", "port2")
THIRD = Card("card3", "0000:03:00.0", "port3")
SHARING = Card("card4", "0000:04:00.0", "port4")
CARDS = (FIRST, SECOND, THIRD, SHARING)
FOR_SALE = (FIRST, SECOND, THIRD)
FOREIGN = "0000:05:00.0"

_PORTS = (
    "pcie-root-port,id=port1,chassis=1,slot=1,bus=pcie.0,addr=0x10",
    "pcie-root-port,id=port2,chassis=2,slot=2,bus=pcie.0,addr=0x11",
    "pcie-root-port,id=port3,chassis=3,slot=3,bus=pcie.0,addr=0x12",
    "pcie-root-port,id=port4,chassis=4,slot=4,bus=pcie.0,addr=0x13.0,multifunction=on,disable-acs=on",
    "pcie-root-port,id=port5,chassis=5,slot=5,bus=pcie.0,addr=0x13.1,disable-acs=on",
)


def functions_of(card: Card) -> list[dict[str, object]]:
    """QEMU's description of a card's functions: at the start as options, later for ``device_add``.

    The first function comes last: with it QEMU tells the server that all of the card is there.
    """
    first: dict[str, object] = {
        "driver": "nvme",
        "id": card.name,
        "serial": card.name,
        "drive": f"{card.name}-disk",
        "bus": card.port,
        "addr": "0.0",
    }
    if card.companion is None:
        return [first]
    second: dict[str, object] = {
        "driver": "qemu-xhci",
        "id": f"{card.name}-companion",
        "bus": card.port,
        "addr": "0.1",
    }
    return [second, first | {"multifunction": True}]


def disk_of(card: Card, directory: Path) -> Path:
    """The disk behind a card, as the outside sees it."""
    return directory / f"{card.name}.raw"


def write_to_disk(card: Card, directory: Path, text: str) -> None:
    """Write to the start of the disk behind a card, from outside."""
    with disk_of(card, directory).open("r+b") as disk:
        disk.write(text.encode())


def read_from_disk(card: Card, directory: Path, sector: int) -> str:
    """What a guest has written to a sector of the disk behind a card, as the outside finds it."""
    with disk_of(card, directory).open("rb") as disk:
        disk.seek(sector * 512)
        return disk.read(512).rstrip(b"\0").decode(errors="replace")


def make_disks(directory: Path) -> None:
    """Empty disks for all cards."""
    for card in CARDS:
        with disk_of(card, directory).open("wb") as disk:
            disk.truncate(DISK_MIB * 2**20)


def devices(directory: Path) -> list[str]:
    """QEMU's options for the ports, the cards and the foreign device."""
    options = [option for port in _PORTS for option in ("-device", port)]
    for card in CARDS:
        # Not -drive, which goes for good when its card is pulled out.
        disk = f"raw,node-name={card.name}-disk,file.driver=file,file.filename={disk_of(card, directory)}"
        options += ["-blockdev", disk]
        for function in functions_of(card):
            options += ["-device", _as_option(function)]
    return [*options, "-device", "e1000e,id=foreign,bus=port5,addr=0.0"]


def _as_option(device: dict[str, object]) -> str:
    pairs = (f"{key}={'on' if value is True else value}" for key, value in device.items())
    return ",".join(pairs).removeprefix("driver=")
