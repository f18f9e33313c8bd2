"""Debian's own ``grub-mkconfig`` takes up what ``gpud setup`` writes for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpud.command import run
from gpud.setup import bootloader
from gpud.setup.change import Change
from gpud.setup.server import Server

MKCONFIG = Path("/usr/sbin/grub-mkconfig")
PROBE = "#!/bin/sh\necho /dev/vda1\n"
LINUX = '#!/bin/sh\necho "linux /vmlinuz root=$GRUB_DEVICE ro $GRUB_CMDLINE_LINUX_DEFAULT"\n'
ARGUMENTS = ("intel_iommu=on", "iommu=pt", "hugepagesz=1G", "hugepages=0:16,1:16")


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def mkconfig(tmp_path: Path) -> Path:
    """The real script, which looks for its configuration and its probe of disks below ``tmp_path``."""
    moved = {'sysconfdir="/etc"': f'sysconfdir="{tmp_path}/etc"',
             'sbindir="${exec_prefix}/sbin"': f'sbindir="{tmp_path}/sbin"'}  # fmt: skip
    text = MKCONFIG.read_text()
    for old, new in moved.items():
        assert old in text
        text = text.replace(old, new)
    program(tmp_path / "grub-mkconfig", text)
    program(tmp_path / "sbin/grub-probe", PROBE)
    program(tmp_path / "etc/grub.d/10_linux", LINUX)
    return tmp_path / "grub-mkconfig"


async def test_arguments_go_behind_those_of_the_distribution_and_of_the_cloud(
    tmp_path: Path, mkconfig: Path
) -> None:
    server = Server(tmp_path)
    for path in ("boot/grub/grub.cfg", "usr/sbin/update-grub"):
        program(tmp_path / path, "")
    (tmp_path / "etc/default/grub.d").mkdir(parents=True)
    (tmp_path / "etc/default/grub").write_text('GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n')
    cloud = tmp_path / "etc/default/grub.d/50-cloudimg-settings.cfg"
    cloud.write_text('GRUB_CMDLINE_LINUX_DEFAULT="console=tty1 console=ttyS0"\n')
    change = bootloader.boot_with(server, ARGUMENTS, (), "a test")
    assert isinstance(change, Change)
    for part in change.parts:
        await part.make(server)
    await run(mkconfig, "-o", tmp_path / "boot/grub/grub.cfg", timeout_s=30)
    line = "console=tty1 console=ttyS0 " + " ".join(ARGUMENTS) + "\n"
    assert line in (tmp_path / "boot/grub/grub.cfg").read_text()
    assert bootloader.arguments_of_ours(server) == ARGUMENTS
    assert change.proof is not None
    assert change.proof[1] in server.text(change.proof[0])
