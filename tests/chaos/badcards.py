"""What can go wrong with a card, and its end: each fault can be mended."""

from __future__ import annotations

import errno
from collections.abc import Callable

from gpud.model import PciAddress
from tests.unit.fakes.kernel import FakeKernel

Fault = Callable[[FakeKernel, PciAddress], None]


def companion(gpu: PciAddress) -> PciAddress:
    """The audio function of a card."""
    return PciAddress(gpu.domain, gpu.bus, gpu.device, 1)


def _fail_reset(kernel: FakeKernel, gpu: PciAddress) -> None:
    kernel.fail(f"devices/{gpu}/reset", errno.EIO)


def _hang_reset(kernel: FakeKernel, gpu: PciAddress) -> None:
    kernel.hang(f"devices/{gpu}/reset")


def _hang_unbind(kernel: FakeKernel, gpu: PciAddress) -> None:
    kernel.hang("drivers/nvidia/unbind", of=gpu)


def _hang_probe(kernel: FakeKernel, gpu: PciAddress) -> None:
    kernel.hang("drivers_probe", of=gpu)


def _refuse_override(kernel: FakeKernel, gpu: PciAddress) -> None:
    kernel.fail(f"devices/{gpu}/driver_override", errno.EPERM)


def _refuse_vfio(kernel: FakeKernel, gpu: PciAddress) -> None:
    kernel.refuse(gpu, "vfio-pci")


def _refuse_own(kernel: FakeKernel, gpu: PciAddress) -> None:
    kernel.refuse(gpu, "nvidia")


def _sleep_long(kernel: FakeKernel, gpu: PciAddress) -> None:
    kernel.sleepy(gpu, 3600)


def _sleep(kernel: FakeKernel, gpu: PciAddress) -> None:
    kernel.sleepy(gpu, 0.5)


def _pull(kernel: FakeKernel, gpu: PciAddress) -> None:
    for function in (gpu, companion(gpu)):
        if function in kernel.addresses:
            kernel.pull(function)


FAULTS: dict[str, Fault] = {
    "its reset fails": _fail_reset,
    "its reset hangs": _hang_reset,
    "its unbind hangs": _hang_unbind,
    "a probe hangs": _hang_probe,
    "driver_override is refused": _refuse_override,
    "vfio-pci refuses it": _refuse_vfio,
    "its own driver refuses it": _refuse_own,
    "it is dead after its reset": _sleep_long,
    "it is slow after its reset": _sleep,
    "it falls off the bus": FakeKernel.fall_off,
    "it is pulled out": _pull,
}


def mend(kernel: FakeKernel, gpu: PciAddress, header: bytes) -> None:
    """Make one card well again, put back if it was pulled; ``header`` is how its config space began."""
    for path in (f"devices/{gpu}/reset", "drivers/nvidia/unbind", "drivers_probe"):
        kernel.release(path)
    kernel.mend(f"devices/{gpu}/driver_override")
    if gpu not in kernel.addresses:
        add_card(kernel, gpu)
        return
    for driver in ("vfio-pci", "nvidia"):
        kernel.accept(gpu, driver)
    kernel.sleepy(gpu, 0)
    kernel._functions[gpu].header = header
    (kernel.home(gpu) / "config").write_bytes(header)


def add_card(kernel: FakeKernel, gpu: PciAddress) -> None:
    """Put in a GPU with its audio function, each on its driver."""
    kernel.add_function(gpu, driver="nvidia", group=gpu.bus)
    kernel.add_function(
        companion(gpu), device=0x22BA, class_code=0x040300, driver="snd_hda_intel", group=gpu.bus,
        bars=(16384,), reset_methods=(),
    )  # fmt: skip
