"""``make measure-boot``: from order to startup script, gpud's seed against a plain ``runcmd`` seed.

The same image, virtual machine, network configuration, user and key on both sides; only the seed
differs. The sides take turns, since the machine may be busy with other things.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shutil
import statistics
import time
from decimal import Decimal
from pathlib import Path

import yaml

from gpud.configfile import load_config
from gpud.guest import cloudinit, disk
from gpud.guest.disk import InstanceFiles
from gpud.guest.image import Image, ImageStore
from gpud.guest.seed import write_seed
from gpud.hypervisor.domainxml import CHANNEL_NAME, DomainSpec, UserNetwork, render
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.model import Gpu, Grant, GuestInput, Instance, PciAddress, Shape, Status, Step, Tier
from tests.machine.gpu_ai import default_state
from tests.machine.server import DEMO_CONFIG, test_image

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDhJXam+MTC9Ox+1yzbQxgUUvBOoJkrvQ5MOmF3XjUM2 measure"
BOOT_TIMEOUT_S = 900


def plain(seed: dict[str, bytes]) -> dict[str, bytes]:
    """The seed people write: the user, the key, and the script in ``runcmd``."""
    ours = yaml.safe_load(seed["user-data"])
    port = f"/dev/virtio-ports/{CHANNEL_NAME}"
    report = f'echo "gpud1 started $(cat /proc/sys/kernel/random/boot_id)" >{port}'
    data = {"hostname": ours["hostname"], "users": ours["users"], "runcmd": [["sh", "-c", report]]}
    meta = {
        key: value for key, value in yaml.safe_load(seed["meta-data"]).items() if key != "dsmode"
    }
    return {
        "user-data": b"#cloud-config\n" + yaml.safe_dump(data).encode(),
        "meta-data": yaml.safe_dump(meta).encode(),
        "network-config": seed["network-config"],
    }


async def order_to_script_s(
    hypervisor: Hypervisor, image: Image, state_dir: Path, *, cores: int, ours: bool
) -> float:
    """Clone, seed, start, and wait for the guest's report; then remove everything."""
    config = load_config(DEMO_CONFIG)
    shape = Shape("h100_sxm", 1, cores, 1024, 6)
    instance = example(shape, image)
    given = GuestInput((KEY,), None, b"#!/bin/sh\nexit 0\n")
    seed = cloudinit.render(cloudinit.GuestSpec.of(instance, given, config))
    files = InstanceFiles.of(state_dir, instance.upstream_id)
    domain_type = await hypervisor.kind()
    began = time.monotonic()
    try:
        await disk.clone(files, image, shape.storage_gib)
        await write_seed(files.seed, seed if ours else plain(seed))
        await hypervisor.start(
            instance.domain_uuid,
            render(
                DomainSpec(
                    name=instance.domain_name, uuid=instance.domain_uuid, owner="measure",
                    upstream_id=instance.upstream_id, mac=instance.mac,
                    memory_mib=shape.memory_mib, cpu_cores=shape.cpu_cores,
                    domain_type=domain_type, firmware="uefi", base=files.base, disk=files.disk,
                    seed=files.seed, nvram=files.nvram, stand_ins=1, network=UserNetwork(),
                )
            ),
        )  # fmt: skip
        stream = await hypervisor.channel(instance.domain_uuid, CHANNEL_NAME)
        async with asyncio.timeout(BOOT_TIMEOUT_S):
            heard = b""
            while b"gpud1 started" not in heard:
                heard += await stream.read()
        return time.monotonic() - began
    finally:
        await hypervisor.stop(instance.domain_uuid)
        await disk.remove(files)


def example(shape: Shape, image: Image) -> Instance:
    gpu = Gpu(PciAddress(0, 0, 0, 0), shape.gpu_type, stand_in=True)
    grant = Grant(shape, (gpu,), None, image.digest, Decimal(1), "US", "here")
    return Instance(
        f"i-{secrets.token_hex(8)}", "measure", "", Tier.SPOT, grant, Status.CREATING,
        Step.CLONE_DISK, 0, 0,
    )  # fmt: skip


async def main() -> None:
    parser = argparse.ArgumentParser(prog="make measure-boot")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    rounds: int = arguments.rounds
    state_dir = default_state("gpud-measure")
    shutil.rmtree(state_dir, ignore_errors=True)
    state_dir.mkdir(parents=True)
    state_dir.chmod(0o711)
    hypervisor = Hypervisor(load_config(DEMO_CONFIG).libvirt.uri, call_timeout_s=30, threads=4)
    connection = asyncio.create_task(hypervisor.run())
    await hypervisor.wait_available()
    image = await ImageStore(state_dir / "images").add(test_image(), "measure")
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for ours in (True, False):
            seconds = await order_to_script_s(
                hypervisor, image, state_dir, cores=arguments.cores, ours=ours
            )
            times[ours].append(seconds)
            print(
                f"round {number + 1}: {'gpud' if ours else 'runcmd':6} {seconds:6.1f} s", flush=True
            )
    connection.cancel()
    gpud, runcmd = (statistics.median(times[ours]) for ours in (True, False))
    print(f"order to script, {arguments.cores} vCPUs, median of {rounds}: "
          f"gpud {gpud:.1f} s, runcmd {runcmd:.1f} s, ratio {gpud / runcmd:.2f}")  # fmt: skip
    shutil.rmtree(state_dir)


if __name__ == "__main__":
    asyncio.run(main())
