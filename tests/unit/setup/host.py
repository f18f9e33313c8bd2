"""A server to set up: a directory for ``/``, a kernel behind its sysfs, programs that act."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpud.command import Completed
from gpud.errors import Code, GpudError
from gpud.setup import make as making
from gpud.setup.change import Change, Item, State
from gpud.setup.make import Undone
from gpud.setup.plan import plan
from gpud.setup.server import Server
from tests.unit.doctor.parts import make_config
from tests.unit.fakes.kernel import FakeKernel

PASSWD = "root:x:0:0::/root:/bin/sh\ngpud:x:990:990::/:/bin/false\nlibvirt-qemu:x:64055:104::/:/x\n"
GROUP = "root:x:0:\nkvm:x:104:\nlibvirt:x:105:gpud\n"
GRUB = "menuentry {{\n\tlinux /vmlinuz root=/dev/vda ro {}\n}}\n"
DEFAULT = 'GRUB_CMDLINE_LINUX_DEFAULT="{}"\n'
SET_UP = "quiet intel_iommu=on iommu=pt"


class Host:
    """The server.

    Attributes:
        kernel: What is behind sysfs.
        ran: Every command, in order, but for questions.
        units: State of each unit of systemd.
        broken: Programs that fail.
        config: What is sold.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "server"
        self.root.mkdir()
        self.kernel = FakeKernel(self.root)
        self.server = Server(self.root, self.kernel.sysfs, uid=0)
        self.ran: list[str] = []
        self.units = {"libvirtd.service": "enabled"}
        self.broken: set[str] = set()
        self.config = make_config(root / "state", gpus={}, network={})
        self.write(
            "/proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n\nflags: other\n"
        )
        self.write("/proc/meminfo", "MemTotal:       67108864 kB\n")
        self.write("/proc/stat", "cpu  1\ncpu0 1\n")
        self.write("/proc/mounts", "hugetlbfs /dev/hugepages hugetlbfs rw,pagesize=2M 0 0\n")
        self.write("/sys/firmware/acpi/tables/DMAR", "")
        self.write("/sys/module/vfio_pci/initstate", "live\n")
        self.write("/usr/lib/modules-load.d/gpud.conf", "vfio-pci\n")
        self.write("/etc/passwd", PASSWD)
        self.write("/etc/group", GROUP)
        self.write("/etc/default/grub", DEFAULT.format(SET_UP))
        self.write("/boot/grub/grub.cfg", GRUB.format(SET_UP))
        for program in ("update-grub", "update-initramfs"):
            self.write(f"/usr/sbin/{program}", "")
        self.write("/dev/kvm", "", mode=0o666)
        self.boot_number = 0
        self.boot()
        self.gpu = self.kernel.add_function("0000:01:00.0", driver="nvidia", group=1)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Put a file there."""
        file = self.server.at(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def remove(self, path: str) -> None:
        self.server.at(path).unlink()

    def text(self, path: str) -> str:
        return self.server.at(path).read_text()

    def boot(self) -> None:
        """Start the kernel anew, with what GRUB gives it."""
        self.boot_number += 1
        self.write("/proc/sys/kernel/random/boot_id", f"boot-{self.boot_number}\n")
        found = re.search(r"linux (.*)", self.text("/boot/grub/grub.cfg"))
        assert found is not None
        self.write("/proc/cmdline", found[1] + "\n")

    def without_iommu(self) -> None:
        """As if Linux did not use it."""
        self.kernel.pull(self.gpu)
        self.remove_groups()
        self.gpu = self.kernel.add_function("0000:01:00.0", driver="nvidia")
        self.write("/etc/default/grub", DEFAULT.format("quiet"))
        self.write("/boot/grub/grub.cfg", GRUB.format("quiet"))
        self.boot()

    def remove_groups(self) -> None:
        groups = self.server.at("/sys/kernel/iommu_groups")
        for group in groups.iterdir():
            for file in (group / "devices").iterdir():
                file.unlink()
            (group / "devices").rmdir()
            group.rmdir()

    def configure(self, **sections: Any) -> None:
        """Configure other than a server that sells an H100."""
        state = self.config.state_dir
        self.config = make_config(state, **{"gpus": {}, "network": {}, **sections})

    # -- what setup does ---------------------------------------------------------------------------

    async def plan(self, *early: str) -> list[Item]:
        return await plan(self.config, self.server, early)

    async def item(self, name: str, *early: str) -> Item:
        """The only item of that name."""
        (found,) = [one for one in await self.plan(*early) if one.name == name]
        return found

    async def state(self, name: str, *early: str) -> State:
        return (await self.item(name, *early)).state

    async def change(self, name: str, *early: str) -> Change:
        found = (await self.item(name, *early)).change
        assert found is not None
        return found

    async def make(self, *early: str) -> list[str]:
        """Make all that is planned; gives the commands that were run."""
        self.ran.clear()
        changes = [one.change for one in await self.plan(*early) if one.change is not None]
        await making.make(changes, self.server, lambda _: None)
        return self.ran

    async def undo(self) -> Undone:
        self.ran.clear()
        return await making.undo(self.server, lambda _: None)

    # -- programs ----------------------------------------------------------------------------------

    async def run(self, *argv: str | Path, ok: Sequence[int] = (0,), **_: Any) -> Completed:
        """In the place of :func:`gpud.command.run`."""
        program, *arguments = map(str, argv)
        if arguments[:1] == ["is-enabled"]:
            return Completed(self.units.get(arguments[1], ""), "", 0 if ok else 1)
        self.ran.append(" ".join([program, *arguments]))
        if program in self.broken:
            raise GpudError(Code.HOST_COMMAND_FAILED, f"{program} ended with status 1")
        act: Callable[..., None] | None = getattr(self, "_" + program.replace("-", "_"), None)
        if act is not None:
            act(*arguments)
        return Completed("", "", 0)

    def _update_grub(self) -> None:
        words = ""
        drop_ins = sorted(self.server.at("/etc/default/grub.d").glob("*.cfg"))
        for file in (self.server.at("/etc/default/grub"), *drop_ins):
            if found := re.search(
                r'^GRUB_CMDLINE_LINUX_DEFAULT="(.*)"', file.read_text(), re.MULTILINE
            ):
                words = found[1].replace("$GRUB_CMDLINE_LINUX_DEFAULT", words)
        self.write("/boot/grub/grub.cfg", GRUB.format(words))

    def _modprobe(self, name: str) -> None:
        if name == "vfio-pci":
            self.kernel.add_driver(name)
            self.write("/sys/module/vfio_pci/initstate", "live\n")
        else:
            self.write("/dev/kvm", "", mode=0o666)

    def _systemd_tmpfiles(self, _: str, file: str) -> None:
        for path, number in re.findall(r"^w (\S+) - - - - (\d+)$", self.text(file), re.MULTILINE):
            self.write(path, f"{number}\n")

    def _systemctl(self, verb: str, *arguments: str) -> None:
        if verb in {"enable", "disable"}:
            self.units[arguments[-1]] = f"{verb}d"

    def _usermod(self, _: str, group: str, user: str) -> None:
        text = re.sub(
            rf"^({group}:.*:.*:.*)$", rf"\1,{user}", self.text("/etc/group"), flags=re.MULTILINE
        )
        self.write("/etc/group", text.replace(":,", ":"))

    def _gpasswd(self, _: str, user: str, group: str) -> None:
        text = re.sub(
            rf"^({group}:.*)\b{user}$", r"\1", self.text("/etc/group"), flags=re.MULTILINE
        )
        self.write("/etc/group", text.replace(":,", ":"))

    def _udevadm(self, *arguments: str) -> None:
        if arguments[0] == "trigger" and self.server.exists("/etc/udev/rules.d/99-gpud-kvm.rules"):
            self.server.at("/dev/kvm").chmod(0o666)
