"""The emulated GPU server: QEMU with an IOMMU and nested virtualisation, driven over ssh and QMP."""

from __future__ import annotations

import asyncio
import re
import shlex
import time
from pathlib import Path

from tests.lab import hardware
from tests.lab.qmp import Qmp
from tests.machine.processes import Program, free_port, output_of

MEMORY_MIB = 5120
CORES = 4

GRUB_CONFIG = "/boot/grub/grub.cfg"
IOMMU_OFF = "intel_iommu=off"
# What `gpud setup` has GRUB add to the server's kernel command line.
_IOMMU_ON = "intel_iommu=on iommu=pt"
# A systemd credential (systemd.system-credentials(7)): the image itself lets nobody in.
_KEY_CREDENTIAL = "opt/io.systemd.credentials/ssh.authorized_keys.root"
_BOOT_TIMEOUT_S = 240
_LOOK_EVERY_S = 10
_GREETING_S = 30
_SILENT_LOOKS = 3
_STUCK = re.compile(rb"soft lockup - CPU#\d+ stuck for (\d+)s")
_STUCK_S = 60
"""A processor that waits its turn on a busy machine is not stuck for as long."""


class GpuServer:
    """A GPU server in a box.

    Attributes:
        missing: Cards that were pulled out.

    Args:
        image: What ``build.sh`` has made.
        payload: A disk image with what is installed in it.
        directory: Where this run keeps its files.
        bare: Without gpud, and somebody has turned its IOMMU off; otherwise it is in use.
    """

    def __init__(self, image: Path, payload: Path, directory: Path, *, bare: bool) -> None:
        self.directory = directory
        self._image = image
        self._payload = payload
        self._bare = bare
        self._ssh_port = free_port()
        self.api_port = free_port()
        self.metrics_port = free_port()
        self._qemu = Program("QEMU", [], directory / "qemu.log", {})
        self._qmp: Qmp | None = None
        self._off = True
        self._up = False
        self._hangs = False
        self.missing: list[hardware.Card] = []

    async def start(self) -> None:
        """Make the disks and the key, and boot."""
        root, base = self.directory / "root.qcow2", self._image / "root.qcow2"
        await output_of(
            "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(root)
        )
        await output_of(
            "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / "key")
        )
        hardware.make_disks(self.directory)
        self._write_ssh_config()
        arguments = _arguments((self._image / "grub.cfg").read_text())
        await self._switch_on(f"{arguments} {IOMMU_OFF if self._bare else _IOMMU_ON}")

    async def reboot(self) -> None:
        """Shut it down and switch it on again, as its own GRUB now says."""
        arguments = _arguments(await self.run(f"cat {GRUB_CONFIG}"))
        self._up, self._off = False, True
        await self.run("systemctl --no-block poweroff")
        async with asyncio.timeout(_BOOT_TIMEOUT_S):
            while self._qemu.running:
                await asyncio.sleep(0.5)
        await self._leave()
        self.qmp.close()
        await self._switch_on(arguments)

    async def _switch_on(self, arguments: str) -> None:
        self._qemu.argv = self._command(arguments)
        self._qemu.start()
        self._off = False
        await self.wait_for_boot()
        self._qmp = await Qmp.connect(self.directory / "qmp.sock")

    async def wait_for_boot(self) -> None:
        """Wait until it lets us in."""
        deadline = time.monotonic() + _BOOT_TIMEOUT_S
        while True:
            try:
                await self.run("true", timeout_s=20)
            except AssertionError as error:
                if not self._qemu.running:
                    raise AssertionError(f"QEMU ended:\n{self._qemu.tail()}") from error
                if time.monotonic() > deadline:
                    self._hangs = True
                    raise
                await asyncio.sleep(1)
            else:
                self._up = True
                return

    async def run(self, command: str, timeout_s: float = 60) -> str:
        """What a command prints that root runs in the server; it must succeed."""
        return await output_of(*self._ssh(), command, timeout_s=timeout_s)

    async def let_reach(self, port: int) -> None:
        """Have a port of its loopback lead to the same one here."""
        *ssh, name = self._ssh()
        await output_of(*ssh, "-O", "forward", "-R", f"127.0.0.1:{port}:127.0.0.1:{port}", name)

    async def write(self, file: str, text: str) -> None:
        """Write a small file in the server, in place."""
        await self.run(f"cat >{file} <<'END_OF_FILE'\n{text}\nEND_OF_FILE")

    async def cut_power(self) -> None:
        """Cut the power for a moment, and wait until it is up again. Nothing in it is told beforehand.

        What it had not flushed to its disk is lost, as is all in its memory.
        """
        self._up = False
        await self._leave()
        await self.qmp.execute("system_reset")
        await self.wait_for_boot()

    async def pull_out(self, card: hardware.Card) -> None:
        """Ask for a card to be pulled out; it goes once the server's kernel lets go of it."""
        await self.qmp.execute("device_del", id=card.name)
        self.missing.append(card)

    async def gone(self, card: hardware.Card, timeout_s: float = 60) -> None:
        """Wait until a card that was pulled out is out; its companion goes with it."""
        await self.qmp.wait_for("DEVICE_DELETED", timeout_s, device=card.name)

    async def put_in(self, card: hardware.Card) -> None:
        """Put a card into its slot again."""
        for function in hardware.functions_of(card):
            await self.qmp.execute("device_add", **function)
        self.missing.remove(card)

    async def stop(self) -> None:
        """Cut the power."""
        if self._qmp is not None:
            self._qmp.close()
        if self._qemu.running:
            await self._leave()
            self._qemu.kill()

    @property
    def qmp(self) -> Qmp:
        assert self._qmp is not None
        return self._qmp

    @property
    def admin_socket(self) -> Path:
        """Leads to gpud's socket for its operator: the command costs seconds to start here."""
        return self.directory / "gpud.sock"

    async def watch(self) -> None:
        """Return when it is dead: when it hangs, its kernel has panicked, or QEMU has ended."""
        silent = 0
        while not self.dead:
            await asyncio.sleep(_LOOK_EVERY_S)
            up = self._up  # it may go down meanwhile
            answers = await self._answers()
            silent = 0 if answers or not (up and self._up) else silent + 1
            self._hangs = silent >= _SILENT_LOOKS

    async def _answers(self) -> bool:
        """Whether sshd still greets who comes, which takes seconds here at worst."""
        writer = None
        try:
            async with asyncio.timeout(_GREETING_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._ssh_port)
                return await reader.readline() != b""
        except (OSError, TimeoutError):
            return False
        finally:
            if writer is not None:
                writer.close()

    @property
    def dead(self) -> bool:
        """Whether it hangs, as its silence or its console tells, has panicked, or QEMU has ended."""
        console = self.directory / "console.log"
        told = console.read_bytes() if console.exists() else b""
        stuck = any(int(seconds) >= _STUCK_S for seconds in _STUCK.findall(told))
        panicked = b"Kernel panic" in told
        return panicked or stuck or self._hangs or not (self._qemu.running or self._off)

    def _ssh(self) -> list[str]:
        return ["ssh", "-F", str(self.directory / "ssh_config"), "server"]

    async def _leave(self) -> None:
        """End the shared ssh connection, which would otherwise wait for a server that is gone."""
        control = [*self._ssh()[:-1], "-O", "exit", "server"]
        process = await asyncio.create_subprocess_exec(
            *control, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        await process.wait()

    def _write_ssh_config(self) -> None:
        # One connection for all commands: a login takes seconds here.
        (self.directory / "ssh_config").write_text(f"""\
Host server
  HostName 127.0.0.1
  Port {self._ssh_port}
  User root
  IdentityFile {self.directory}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 15
  ControlMaster auto
  ControlPath {self.directory}/ssh
  ControlPersist yes
  StreamLocalBindUnlink yes
  LocalForward {self.admin_socket} /run/gpud/gpud.sock
  LocalForward 127.0.0.1:{self.metrics_port} 127.0.0.1:9487
""")

    def _command(self, arguments: str) -> list[str]:
        here, image = self.directory, self._image
        forwards = (
            f"hostfwd=tcp:127.0.0.1:{self._ssh_port}-:22,"
            f"hostfwd=tcp:127.0.0.1:{self.api_port}-:8443"
        )
        options = f"""
            -machine q35,kernel-irqchip=split -accel tcg,thread=multi -cpu EPYC,+svm
            -m {MEMORY_MIB} -smp {CORES} -nodefaults -no-user-config -display none
            -kernel {image}/vmlinuz -initrd {image}/initrd.img
            -serial file:{here}/console.log -qmp unix:{here}/qmp.sock,server=on,wait=off
            -fw_cfg name={_KEY_CREDENTIAL},file={here}/key.pub
            -device intel-iommu,intremap=on -device virtio-rng-pci
            -drive file={here}/root.qcow2,if=none,id=root,cache=unsafe -device virtio-blk-pci,drive=root
            -drive file={self._payload},if=none,id=payload,format=raw,readonly=on
            -device virtio-blk-pci,drive=payload
            -netdev user,id=uplink,{forwards} -device virtio-net-pci,netdev=uplink
        """
        return [
            "qemu-system-x86_64",
            *shlex.split(options),
            "-append",
            arguments,
            *hardware.devices(here),
        ]


def _arguments(grub_config: str) -> str:
    """What the first entry of GRUB's menu starts Linux with."""
    line = next(line.split() for line in grub_config.splitlines() if line.split()[:1] == ["linux"])
    return " ".join(line[2:])
