"""Small real disks: partitions, ext4 and FAT, made by the tools that make large ones."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

MIB = 2**20
ROOT_AT = 8 * MIB
"""Where the root file system begins."""
TOOLS = (
    "qemu-img", "sfdisk", "mke2fs", "mformat", "mmd", "mcopy", "debugfs", "e2fsck", "cp",
)  # fmt: skip
MODULES = "".join(
    f"kernel/drivers/{name}.ko.zst: \n" for name in ("virtio_pci", "virtio-blk", "virtio_net")
)
FIT: Mapping[str, str | bytes] = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nbuild:x:1000:1000::/home/build:/bin/sh\n",
    "etc/shadow": "root:*:1:0:99999:7:::\nbuild:!:1:0:99999:7:::\n",
    "etc/machine-id": "",
    "etc/cloud/cloud.cfg": "users: [default]\n",
    "etc/systemd/system/multi-user.target.wants/ssh.service": b"-> /lib/systemd/system/ssh.service",
    "usr/lib/systemd/systemd": "",
    "usr/bin/cloud-init": "",
    "usr/sbin/sshd": "",
    "usr/bin/growpart": "",
    "usr/sbin/resize2fs": "",
    "usr/bin/dockerd": "",
    "usr/bin/nvidia-ctk": "",
    "lib": b"-> usr/lib",
    "usr/lib/modules/6.1.0-9/modules.builtin": "kernel/drivers/char/virtio_console.ko\n",
    "usr/lib/modules/6.1.0-9/modules.dep": MODULES + "updates/dkms/nvidia.ko: \n",
    "boot/vmlinuz-6.1.0-9": "",
    "boot/initrd.img-6.1.0-9": "",
    "boot/grub/grub.cfg": "linux /vmlinuz root=LABEL=root console=ttyS0,115200\n",
    "var/lib/dpkg/status": (
        "Package: cloud-init\nStatus: install ok installed\nVersion: 25.1.4-0ubuntu0~24.04.1\n\n"
        "Package: libnvidia-compute-580\nStatus: install ok installed\nVersion: 580.95.05-0ubuntu1\n\n"
        "Package: libnvidia-ml1\nStatus: deinstall ok config-files\nVersion: 1\n\n"
        "Package: other\nDescription: a text\n with lines\n"
    ),
}
"""A system that may be cloned and that gpud can sell. Bytes beginning with an arrow are a link."""

LEFT_BEHIND: Mapping[str, str | bytes] = {
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "var/lib/dbus/machine-id": "0123456789abcdef0123456789abcdef\n",
    "etc/ssh/ssh_host_ed25519_key": "SECRET",
    "etc/ssh/ssh_host_ed25519_key.pub": "SECRET",
    "var/lib/cloud/instances/i-1/sem/config_ssh": "",
    "var/lib/cloud/instance": b"-> /var/lib/cloud/instances/i-1",
    'var/lib/cloud/seed/odd "name/user data': "SECRET",
    "var/lib/systemd/random-seed": "SECRET",
    "root/.ssh/authorized_keys": "SECRET",
    "home/build/.ssh/id_rsa": "SECRET",
    "home/build/.bash_history": "SECRET",
    "var/lib/dhcp/dhclient.eth0.leases": "SECRET",
    "etc/netplan/50-cloud-init.yaml": "SECRET",
    "var/log/journal/0123/system.journal": "SECRET",
    "var/log/wtmp": "",
    "var/log/README": b"-> ../../usr/share/doc/systemd/README.logs",
    "var/cache/apt/archives/some.deb": "SECRET",
    "tmp/left": "SECRET",
}

Tree = Mapping[str, str | bytes]
MakeDisk = Callable[..., Path]


@pytest.fixture(scope="session")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Disks that were made already, for they are asked for again and again."""
    made: dict[tuple[object, ...], Path] = {}

    def master(tree: Tree, loader: bytes | None, boot: Tree | None, code: bytes) -> Path:
        key = (tuple(tree.items()), loader, boot and tuple(boot.items()), code)
        if key not in made:
            scratch = tmp_path_factory.mktemp("master")
            made[key] = _make(scratch, tree, loader, boot, code)
        return made[key]

    return master


@pytest.fixture
def make_disk(tmp_path: Path, masters: Callable[..., Path]) -> MakeDisk:
    """Lay a system out on a raw disk: a boot partition for UEFI, and the root's."""

    def make(
        tree: Tree = FIT,
        loader: bytes | None = b"EFI",
        boot: Tree | None = None,
        code: bytes = b"\x90",
    ) -> Path:
        disk = tmp_path / "disk.raw"
        run("cp", "--sparse=always", str(masters(tree, loader, boot, code)), str(disk))
        return disk

    return make


def _make(scratch: Path, tree: Tree, loader: bytes | None, boot: Tree | None, code: bytes) -> Path:
    disk = scratch / "disk.raw"
    with disk.open("wb") as stream:
        stream.truncate(20 * MIB)
    table = ["label: gpt", "start=1MiB, size=2MiB, type=uefi", "start=3MiB, size=4MiB"]
    table += ["start=7MiB, size=1MiB", f"start={ROOT_AT // MIB}MiB, size=8MiB"]
    run("sfdisk", "--quiet", str(disk), stdin="\n".join(table))
    with disk.open("r+b") as stream:
        stream.write(code)
    if loader is not None:
        _fill_uefi(disk, loader, scratch)
    if boot is not None:
        _fill_ext4(disk, boot, scratch / "boot", at=3 * MIB, size_mib=4)
    _fill_ext4(disk, tree, scratch / "root", at=ROOT_AT, size_mib=8)
    return disk


def run(*argv: str, stdin: str | None = None) -> str:
    done = subprocess.run(argv, input=stdin, text=True, check=True, capture_output=True)
    return done.stdout


def _fill_uefi(disk: Path, loader: bytes, scratch: Path) -> None:
    where = f"{disk}@@1M"
    program = scratch / "loader"
    program.write_bytes(loader)
    run("mformat", "-i", where, "-T", str(2 * MIB // 512), "-h", "64", "-s", "32", "::")
    run("mmd", "-i", where, "::/EFI", "::/EFI/BOOT")
    run("mcopy", "-i", where, str(program), "::/EFI/BOOT/BOOTX64.EFI")


def _fill_ext4(disk: Path, tree: Tree, top: Path, *, at: int, size_mib: int) -> None:
    for name, content in tree.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes) and content.startswith(b"-> "):
            path.symlink_to(content[3:].decode())
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    run(
        "mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={at}", "-d", str(top),
        str(disk), f"{size_mib}M",
    )  # fmt: skip
