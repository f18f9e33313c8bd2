"""A sysfs and procfs tree with a kernel behind it that reacts to what is written.

The tree is made of real files, directories and links, so everything that reads sysfs reads it as it
would the real one. Writes come in through :class:`gpud.host.sysfs.KernelFiles`, where the daemon has its
child processes: that is the outermost edge, and everything of gpud above it is real::

    kernel = FakeKernel(tmp_path)
    gpu = kernel.add_function("0000:41:00.0", driver="nvidia", group=12)
    kernel.add_function("0000:41:00.1", driver="snd_hda_intel", group=12, class_code=0x040300)
    handover = Handover(kernel.sysfs, kernel.proc, sleep=kernel.sleep, clock=kernel.clock)
    await handover.bind([gpu, ...])
    assert kernel.driver(gpu) == "vfio-pci"
    assert kernel.writes == [("devices/0000:41:00.1/driver_override", "vfio-pci"), ...]

Time is the kernel's own: ``sleep`` moves it, and so does a write that runs out of time, by as much as it
was given. What happens later (a slow driver, a slow reset) happens while somebody sleeps.

Faults, all by path below ``bus/pci`` (``devices/ADDRESS/reset``, ``drivers/nvidia/unbind``,
``drivers_probe``); ``of`` narrows one on a shared file to the writes about one address:

- ``fail(path, errno.EBUSY, of=...)``: writes are refused with it, until ``mend(path)``.
- ``hang(path, of=...)``: the next write is never done in time. Like in the real kernel, the function's
  lock is held from then on, so that all else about it hangs too. ``release(path)`` lets the
  write take effect, late, and ends that.
- ``refuse(address, driver)``: the driver's probe fails, which the kernel calls a success.
- ``unconfirm(address, method)``: a reset by it is done, but not seen to end (ENOTTY).
- ``slow(driver, seconds)``: the driver shows up that long after its probe.
- ``sleepy(address, seconds)``: after a reset the function does not answer for so long.
- ``pull(address)``: the function is taken out: its files vanish.
- ``fall_off(address)``: it is dead: config space reads as all ones, the kernel's own files stay.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gpud.errors import Code, GpudError
from gpud.host.sysfs import Sysfs
from gpud.model import PciAddress
from tests.unit.fakes.kernel_tree import (
    GPU_BARS,
    INTERRUPTS,
    SUBSYSTEM_DEVICE,
    Fault,
    Function,
    header_of,
    link,
    place_bars,
    write_files,
)


class FakeKernel:
    """See the module's text.

    Attributes:
        root: The server's own directory; a boot of it makes another one.
        proc: Procfs, for the facts about the IOMMU and for processes (``add_process``).
        sysfs: The tree, with this kernel behind it.
        writes: Every write in order, refused and hanging ones included: path below ``bus/pci``, and
            text without its newline.
        resets: Every reset that was done: the function, and the method.
        now: Seconds.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = root / "proc"
        self._sys = root / "sys"
        self._bus = self._sys / "bus/pci"
        self.sysfs = Sysfs(self._sys, self)
        self.writes: list[tuple[str, str]] = []
        self.resets: list[tuple[PciAddress, str]] = []
        self.now = 1000.0
        self._functions: dict[PciAddress, Function] = {}
        self._claims: dict[str, set[str]] = {}  # driver -> ids of functions that it takes by itself
        self._slow: dict[str, float] = {}
        self._faults: list[Fault] = []
        self._later: list[tuple[float, Callable[[], None]]] = []
        for directory in ("bus/pci/devices", "bus/pci/drivers", "kernel/iommu_groups"):
            (self._sys / directory).mkdir(parents=True)
        (self._bus / "drivers_probe").touch()
        self.proc.mkdir()
        (self.proc / "interrupts").write_text(INTERRUPTS)
        (self.proc / "cmdline").write_text("root=/dev/vda ro intel_iommu=on iommu=pt\n")
        self.add_driver("vfio-pci")

    # -- what is in the server ---------------------------------------------------------------------

    def add_driver(self, name: str, *ids: str) -> None:
        """Load a driver that takes functions with these ids (``10de:2330``), in order of loading."""
        directory = self._bus / "drivers" / name
        directory.mkdir(exist_ok=True)
        for file in ("bind", "unbind", "new_id"):
            (directory / file).touch()
        self._claims.setdefault(name, set()).update(ids)

    def remove_driver(self, name: str) -> None:
        """Unload a driver that has nothing."""
        shutil.rmtree(self._bus / "drivers" / name)
        del self._claims[name]

    def add_function(
        self,
        address: str | PciAddress,
        *,
        vendor: int = 0x10DE,
        device: int = 0x2330,
        class_code: int = 0x030200,
        revision: int = 0xA1,
        driver: str | None = None,
        group: int | None = None,
        numa_node: int = 0,
        bars: Sequence[int] = GPU_BARS,
        reset_methods: Sequence[str] = ("flr", "bus"),
        upstream: Sequence[str] | None = None,
        header_type: int = 0x00,
    ) -> PciAddress:
        """Put a function in, bound to ``driver``, which from then on takes its like by itself.

        ``bars`` are the sizes of its 64-bit memory BARs, three at most; ``upstream`` the bridges above
        it, which get no files of their own; without them, it is below a root port of its bus.
        """
        where = PciAddress.parse(address) if isinstance(address, str) else address
        above = [f"0000:40:{where.bus % 32:02x}.0"] if upstream is None else upstream
        home = self._sys.joinpath("devices/pci0000:40", *above, str(where))
        header = header_of(vendor, device, class_code, revision, header_type)
        attributes = {
            "vendor": f"{vendor:#06x}",
            "device": f"{device:#06x}",
            "subsystem_vendor": f"{vendor:#06x}",
            "subsystem_device": f"{SUBSYSTEM_DEVICE:#06x}",
            "class": f"{class_code:#08x}",
            "revision": f"{revision:#04x}",
            "numa_node": str(numa_node),
            "resource": place_bars(header, where, bars),
            "power_state": "D0",
            "power/control": "auto",
            "d3cold_allowed": "1",
            "driver_override": "(null)",
        }
        write_files(home, attributes, bytes(header), reset_methods)
        link(self._bus / "devices" / str(where), home)
        if group is not None:
            members = self._sys / f"kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            link(members / str(where), home)
            link(home / "iommu_group", members.parent)
        function = Function(where, vendor, device, home, tuple(reset_methods), bytes(header))
        self._functions[where] = function
        if driver is not None:
            self.add_driver(driver, *(() if driver == "vfio-pci" else (function.ids,)))
            self._bind(function, driver)
        return where

    def add_process(
        self, pid: int, name: str, *opened: str, parent: int = 1, readable: bool = True
    ) -> None:
        """Start a process that has these files open; whose they are is not told unless ``readable``."""
        directory = self.proc / str(pid)
        directory.mkdir()
        (directory / "comm").write_text(f"{name[:15]}\n")
        (directory / "stat").write_text(f"{pid} ({name[:15]}) S {parent} {pid} 0 0\n")
        if not readable:
            (directory / "fd").touch()  # listing it fails, for root as well
            return
        (directory / "fd").mkdir()
        for number, path in enumerate(opened):
            (directory / "fd" / str(number)).symlink_to(path)

    def add_node(self, address: PciAddress, path: str) -> None:
        """Give a function a device node's directory, such as ``drm/card0``."""
        directory = self.home(address) / path
        directory.mkdir(parents=True)
        (directory / "dev").write_text("226:0\n")

    # -- faults ------------------------------------------------------------------------------------

    def fail(self, path: str, number: int, *, of: PciAddress | None = None) -> None:
        self._faults.append(Fault(path, of, number))

    def hang(self, path: str, *, of: PciAddress | None = None) -> None:
        self._faults.append(Fault(path, of, None))

    def mend(self, path: str) -> None:
        self._faults = [fault for fault in self._faults if fault.path != path]

    def release(self, path: str) -> None:
        """Let the write to ``path`` that hangs take effect, and the function's others be done again."""
        hanging = [fault for fault in self._faults if fault.path == path and fault.errno is None]
        self.mend(path)
        for fault in hanging:
            if fault.late is not None:
                function, text = fault.late
                if function is not None:
                    function.stuck = False
                if function is None or function.home.exists():
                    self._react(path, function, text)

    def refuse(self, address: PciAddress, driver: str) -> None:
        self._functions[address].refused.add(driver)

    def accept(self, address: PciAddress, driver: str) -> None:
        self._functions[address].refused.discard(driver)

    def unconfirm(self, address: PciAddress, method: str) -> None:
        self._functions[address].unconfirmed.add(method)

    def slow(self, driver: str, seconds: float) -> None:
        self._slow[driver] = seconds

    def sleepy(self, address: PciAddress, seconds: float) -> None:
        self._functions[address].slow_reset_s = seconds

    def fall_off(self, address: PciAddress) -> None:
        function = self._functions[address]
        function.header = b"\xff" * 64
        (function.home / "config").write_bytes(function.header)

    def pull(self, address: PciAddress) -> None:
        function = self._functions.pop(address)
        self._unbind(function)
        (self._bus / "devices" / str(address)).unlink()
        for group in (self._sys / "kernel/iommu_groups").iterdir():
            (group / "devices" / str(address)).unlink(missing_ok=True)
        shutil.rmtree(function.home)

    # -- what came of it ---------------------------------------------------------------------------

    def driver(self, address: PciAddress) -> str | None:
        return self._functions[address].driver

    def override(self, address: PciAddress) -> str:
        return self._functions[address].override

    def home(self, address: PciAddress) -> Path:
        """The function's directory, for a test that wants to change what a file says."""
        return self._functions[address].home

    @property
    def addresses(self) -> list[PciAddress]:
        return sorted(self._functions)

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        due = [act for at, act in self._later if at <= self.now]
        self._later = [(at, act) for at, act in self._later if at > self.now]
        for act in due:
            act()

    # -- KernelFiles -------------------------------------------------------------------------------

    async def write(self, file: Path, text: str, timeout_s: float) -> None:
        # A function's directory may be reached through its driver's links; the bus knows it by name.
        path = os.fspath(file.relative_to(self._bus))
        self.writes.append((path, text.strip()))
        function = self._concerned(path, text)
        if not file.exists():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._meet_faults(path, function, text, timeout_s)
        self._react(path, function, text)

    async def read(self, file: Path, size: int, timeout_s: float) -> bytes:
        path = os.fspath(file.relative_to(self._bus))
        self._meet_faults(path, self._concerned(path, ""), None, timeout_s)
        return file.read_bytes()[:size]

    async def read_many(self, files: Sequence[Path], size: int, timeout_s: float) -> list[bytes]:
        found = [await self._first_bytes(file, size) for file in files]
        if files and all(content is None for content in found):
            self.now += timeout_s
            raise GpudError(Code.GPU_UNUSABLE, "not one file could be read", transient=True)
        return [content or b"" for content in found]

    async def _first_bytes(self, file: Path, size: int) -> bytes | None:
        """None if it hangs, which costs no time: what is known to hang is not asked again."""
        try:
            return await self.read(file, size, 0)
        except OSError:
            return b""
        except GpudError:
            return None

    def _meet_faults(
        self, path: str, function: Function | None, text: str | None, timeout_s: float
    ) -> None:
        """Refuse or hang what a fault was set for; ``text`` is None for a read, which leaves no trace."""
        address = None if function is None else function.address
        for fault in [fault for fault in self._faults if fault.hits(path, address)]:
            if fault.errno is not None:
                raise OSError(fault.errno, os.strerror(fault.errno))
            if text is not None and fault.late is None:
                fault.late = function, text
                if function is not None:
                    function.stuck = True
            self._run_out(timeout_s, "od" if text is None else "dd")
        if function is not None and function.stuck:
            self._run_out(timeout_s, "od" if text is None else "dd")

    def _run_out(self, timeout_s: float, program: str) -> None:
        self.now += timeout_s
        raise GpudError(
            Code.HOST_COMMAND_FAILED,
            f"{program} did not end within {timeout_s:g} s and was killed; it has not gone away yet"
            " (stuck inside the kernel?)",
        )

    # -- reactions ---------------------------------------------------------------------------------

    def _concerned(self, path: str, text: str) -> Function | None:
        parts = path.split("/")
        name = parts[1] if parts[0] == "devices" else text.strip()
        try:
            return self._functions.get(PciAddress.parse(name))
        except ValueError:
            return None

    def _react(self, path: str, function: Function | None, text: str) -> None:
        content = text.removesuffix("\n")
        match path.split("/"):
            case ["drivers", name, "unbind"]:
                if function is None or function.driver != name:
                    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
                self._unbind(function)
            case ["drivers_probe"]:
                if function is None:
                    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
                self._probe(function)
            case ["devices", _, *rest] if function is not None:
                self._set("/".join(rest), function, content)
            case _:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def _set(self, name: str, function: Function, content: str) -> None:
        match name:
            case "driver_override":
                function.override = content
                content = content or "(null)"
            case "reset_method":
                possible = self._possible_resets(function)
                wanted = possible if content == "default" else content.split()
                if not set(wanted) <= set(possible):
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                content = " ".join(wanted)
            case "reset":
                self._reset(function, content)
                return
            case "power/control" if content in {"on", "auto"}:
                state = "D3hot" if content == "auto" and function.driver == "vfio-pci" else "D0"
                (function.home / "power_state").write_text(f"{state}\n")
            case "d3cold_allowed" if content in {"0", "1"}:
                pass
            case _:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        (function.home / name).write_text(f"{content}\n")

    def _reset(self, function: Function, content: str) -> None:
        if content != "1":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        listed = function.home / "reset_method"
        methods = listed.read_text().split() if listed.exists() else function.methods
        confirmed = False
        for method in [method for method in methods if method in self._possible_resets(function)]:
            self.resets.append((function.address, method))
            if function.slow_reset_s:
                (function.home / "config").write_bytes(b"\xff" * 64)
                come_back = partial(self._come_back, function)
                self._later.append((self.now + function.slow_reset_s, come_back))
            if confirmed := method not in function.unconfirmed:
                break
        if not confirmed:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def _come_back(self, function: Function) -> None:
        if function.home.exists():
            (function.home / "config").write_bytes(function.header)

    def _possible_resets(self, function: Function) -> list[str]:
        """Less than ``reset_method`` may say: ``bus`` is for a function alone below its bridge."""
        alone = (
            sum(one.home.parent == function.home.parent for one in self._functions.values()) == 1
        )
        return [method for method in function.methods if alone or method != "bus"]

    def _probe(self, function: Function) -> None:
        if function.driver is not None:
            return
        for name, ids in self._claims.items():
            takes = function.override == name or (not function.override and function.ids in ids)
            if takes and name not in function.refused:
                if seconds := self._slow.get(name):
                    self._later.append((self.now + seconds, partial(self._show_up, function, name)))
                else:
                    self._bind(function, name)
                return

    def _show_up(self, function: Function, name: str) -> None:
        if function.home.exists() and function.driver is None:
            self._bind(function, name)

    def _bind(self, function: Function, name: str) -> None:
        function.driver = name
        link(function.home / "driver", self._bus / "drivers" / name)
        link(self._bus / "drivers" / name / str(function.address), function.home)
        if name == "vfio-pci":  # it lets what nobody uses go to sleep
            self._set("power/control", function, "auto")

    def _unbind(self, function: Function) -> None:
        if function.driver is not None:
            (function.home / "driver").unlink()
            (function.home / "power_state").write_text("D0\n")
            (self._bus / "drivers" / function.driver / str(function.address)).unlink()
            function.driver = None
