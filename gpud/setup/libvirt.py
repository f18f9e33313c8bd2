"""libvirt, and what guests get from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gpud.config import Config
from gpud.errors import GpudError
from gpud.guest.image import ImageStore
from gpud.setup.change import Change, Item, by_hand, fine
from gpud.setup.parts import Unit
from gpud.setup.seen import Seen

_NAME: Final = "libvirt"
_SYSTEM: Final = "qemu:///system"
_WHOLE: Final = "libvirtd.service"
_AWAKE: Final = frozenset({"enabled", "enabled-runtime"})


def libvirt(config: Config, seen: Seen) -> Iterator[Change | Item]:
    """Whether libvirt is started at boot."""
    if config.libvirt.uri != _SYSTEM:
        yield fine(_NAME, f"{config.libvirt.uri} is not started by systemd")
        return
    running = [name for name, state in seen.units.items() if state in _AWAKE and name != _WHOLE]
    if seen.units.get(_WHOLE) == "masked" and not running:
        yield by_hand(_NAME, f"{_WHOLE} is masked", f"systemctl unmask {_WHOLE}; gpud setup again")
    elif running:
        yield fine(_NAME, f"{running[0]} starts it")
    elif _WHOLE in seen.units:
        yield Change(
            name=_NAME,
            what=f"start {_WHOLE}, now and at each boot",
            why="gpud's guests are libvirt's",
            undo=f"systemctl disable {_WHOLE}; it runs on until the next boot",
            parts=(Unit(_WHOLE),),
        )
    elif seen.units:
        sockets = "virtqemud.socket virtnetworkd.socket virtstoraged.socket virtnodedevd.socket"
        yield by_hand(
            _NAME,
            "it is installed in parts, and nothing starts them",
            f"systemctl enable --now {sockets}",
        )
    else:
        yield by_hand(
            _NAME,
            "it is not installed, or systemd does not run here",
            "apt install libvirt-daemon-system qemu-system-x86 ovmf",
        )


def network(config: Config) -> Item:
    """The guests' network, which the daemon makes."""
    if config.network.mode == "user":
        return fine("network", "QEMU's own (network.mode: user)")
    made = f"{config.network.name}, {config.network.subnet}"
    return fine(
        "network", f"{made}: gpud makes and starts it at its own start, libvirt lets it forward"
    )


def image(config: Config) -> Item:
    """The image that guests' disks stand on, which only the daemon's user may bring in."""
    name = config.guest.image
    try:
        found = ImageStore(Path(config.state_dir) / "images").resolve(name)
    except GpudError as error:
        mend = f"runuser -u gpud -- gpud image add FILE --name {name}"
        return by_hand("image", error.detail, f"{mend}   (gpud must be able to read FILE)")
    return fine("image", f"{name}, {found.digest[:19]}")
