"""What people do without gpud: ``virt-install``, or ``qemu-img`` and ``virsh``."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

import yaml

from gpud.configfile import load_config
from gpud.guest import cloudinit
from gpud.guest.disk import InstanceFiles
from gpud.guest.image import Image
from gpud.guest.seed import write_seed
from gpud.hypervisor.domainxml import DomainSpec, UserNetwork, render
from gpud.model import GuestInput, Instance, Shape
from tests.bench.history import example
from tests.machine.processes import output_of
from tests.machine.server import DEMO_CONFIG

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDhJXam+MTC9Ox+1yzbQxgUUvBOoJkrvQ5MOmF3XjUM2 bench"


class ByHand:
    """One guest of somebody who has no gpud.

    Args:
        directory: Where its files go; removed by :meth:`remove`.
        image: What its disk is an overlay of.
        shape: Cores, memory and disk.
        domain_type: As gpud's guests have it.
        script: What its startup script is.
    """

    def __init__(
        self, directory: Path, image: Image, shape: Shape, domain_type: str, script: str
    ) -> None:
        self.instance: Instance = example(shape, image.digest)
        self.files = InstanceFiles(directory / self.instance.upstream_id)
        self.uuid: uuid.UUID = self.instance.domain_uuid
        self._image = image
        self._shape = shape
        self._domain_type = domain_type
        self._script = script
        self._config = load_config(DEMO_CONFIG)
        self._directory = directory
        self._installed = directory / f"{self.name}.qcow2"
        self._defined = False
        self.files.directory.mkdir(parents=True)
        self.files.directory.chmod(0o711)

    @property
    def name(self) -> str:
        return self.instance.domain_name

    def seed(self) -> dict[str, bytes]:
        """What gpud would tell this guest."""
        given = GuestInput((KEY,), None, self._script.encode())
        return cloudinit.render(cloudinit.GuestSpec.of(self.instance, given, self._config))

    async def write_seed(self, files: Mapping[str, bytes]) -> None:
        await write_seed(self.files.seed, files)

    def write_xml(self) -> Path:
        """The domain, as gpud would write it."""
        files, shape = self.files, self._shape
        spec = DomainSpec(
            name=self.name, uuid=self.uuid, owner="bench", upstream_id=self.instance.upstream_id,
            mac=self.instance.mac, memory_mib=shape.memory_mib, cpu_cores=shape.cpu_cores,
            domain_type="kvm" if self._domain_type == "kvm" else "qemu", firmware="uefi",
            base=self._image.path, disk=files.disk, seed=files.seed, nvram=files.nvram,
            stand_ins=1, network=UserNetwork(),
        )  # fmt: skip
        path = files.directory / "domain.xml"
        path.write_text(render(spec))
        return path

    async def create(self, xml: Path) -> None:
        """An overlay and ``virsh create``."""
        await output_of(
            "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(self._image.path),
            str(self.files.disk), f"{self._shape.storage_gib}G",
        )  # fmt: skip
        await self._virsh("create", str(xml))

    async def virt_install(self) -> None:
        """One ``virt-install`` with everything."""
        self._defined = True
        seed = plain(self.seed(), self._script)
        for name, content in seed.items():
            (self.files.directory / name).write_bytes(content)
        given = ",".join(f"{name}={self.files.directory / name}" for name in seed)
        disk = (
            f"path={self._installed},format=qcow2,bus=virtio,size={self._shape.storage_gib},"
            f"backing_store={self._image.path},backing_format=qcow2"
        )
        await output_of(
            "env", f"XDG_CACHE_HOME={self._directory}",  # where QEMU's user gets to the seed
            "virt-install", "--connect", self._config.libvirt.uri, "--name", self.name,
            "--uuid", str(self.uuid), "--virt-type", self._domain_type,
            "--memory", str(self._shape.memory_mib), "--vcpus", str(self._shape.cpu_cores),
            "--import", "--disk", disk, "--cloud-init", given, "--boot", "uefi",
            "--network", "user,model=virtio", "--graphics", "none",
            "--osinfo", "detect=off,require=off", "--noautoconsole",
        )  # fmt: skip

    async def remove(self) -> None:
        """``virsh destroy``, ``undefine``, ``rm``."""
        await self._virsh("destroy", self.name)
        if self._defined:
            await self._virsh("undefine", "--nvram", self.name)
        await output_of("rm", "-rf", str(self._installed), str(self.files.directory))

    async def _virsh(self, *arguments: str) -> str:
        return await virsh(self._config.libvirt.uri, *arguments)


async def virsh(uri: str, *arguments: str) -> str:
    return await output_of("virsh", "-q", "-c", uri, *arguments)


async def forget_pools(uri: str, directory: Path) -> None:
    """Remove the storage pools that virt-install has made of directories below this one."""
    for pool in (await virsh(uri, "pool-list", "--all", "--name")).split():
        if f"<path>{directory}/" in await virsh(uri, "pool-dumpxml", pool):
            await virsh(uri, "pool-destroy", pool)
            await virsh(uri, "pool-undefine", pool)


def plain(seed: Mapping[str, bytes], script: str) -> dict[str, bytes]:
    """The seed people write: the user, the key, and the script in ``runcmd``."""
    ours = yaml.safe_load(seed["user-data"])
    data = {
        "hostname": ours["hostname"],
        "users": ours["users"],
        "runcmd": [["bash", "-c", script]],
    }
    meta = yaml.safe_load(seed["meta-data"])
    del meta["dsmode"]
    return {
        "user-data": b"#cloud-config\n" + yaml.safe_dump(data).encode(),
        "meta-data": yaml.safe_dump(meta).encode(),
        "network-config": seed["network-config"],
    }
