"""The golden image: whole disks sealed for real, and one built by its recipe."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machine.conftest import ServerFactory
from tests.machine.processes import GPUD, output_of
from tests.machine.server import GpudServer
from tests.machine.server import test_image as guest_image

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "cloud-init/golden/build.sh"
ROOT_AT = 65 * 2**20
"""Where tests/guest/build.sh puts the root file system."""
SECRET = "what the build machine left"
PLANTED = (
    "/etc/ssh/ssh_host_rsa_key", "/root/.bash_history", "/root/.ssh/authorized_keys",
    "/var/lib/systemd/random-seed", "/var/log/syslog", "/etc/machine-id",
)  # fmt: skip
SCRIPT = """\
#!/bin/sh
set -e
hello
[ -s /etc/machine-id ]
ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub
! getent passwd debian
"""
"""What was installed is there; what was taken out is new; and no user came from the distribution."""
BUILD_TIMEOUT_S = 3000


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory for whole disks, which pytest's own may be too small for."""
    path = Path(tempfile.mkdtemp(prefix="gpud-golden-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


async def unwell(image: Path) -> dict[str, str]:
    """What `gpud image check` says of an image that is not well, with its level."""
    script = '"$@" || [ $? -le 2 ]'
    said = await output_of(
        "sh", "-c", script, "-", *GPUD, "image", "check", "--json", str(image), timeout_s=300
    )
    verdicts: list[dict[str, Any]] = json.loads(said)["verdicts"]
    return {one["name"]: one["level"] for one in verdicts if one["level"] != "ok"}


async def exit_code(server: GpudServer, upstream_id: str) -> int | None:
    """How an order's script ended; None until it has."""
    listed = json.loads(await server.gpud("instances", "--json"))
    code: int | None = next(
        one["script_exit_code"] for one in listed if one["upstream_id"] == upstream_id
    )
    return code


async def plant(image: Path, scratch: Path) -> None:
    """Leave traces in a raw disk, as a machine that ran from it would."""
    secret = scratch / "secret"
    secret.write_text(SECRET)
    lines = [
        f"cd {path.rpartition('/')[0]}\nrm {path}\nwrite {secret} {path.rpartition('/')[2]}\n"
        for path in PLANTED
    ]
    requests = scratch / "requests"
    requests.write_text("".join(lines))
    await output_of("debugfs", "-w", "-f", str(requests), f"{image}?offset={ROOT_AT}")


async def recipe(profile: str | Path, target: Path, **settings: object) -> str:
    """What the recipe prints when it is followed with these settings."""
    known = {"GPUD": f"{sys.executable} -m gpud", "PYTHONPATH": ROOT, **settings}
    env = [f"{name}={value}" for name, value in known.items()]
    return await output_of(
        "env", *env, str(RECIPE), str(profile), str(target), timeout_s=BUILD_TIMEOUT_S + 300
    )


async def test_the_tests_own_guest_is_sealed() -> None:
    assert await unwell(guest_image()) == {"NVIDIA driver": "note", "containers": "note"}


async def test_a_whole_disk_that_was_used_is_sealed_beyond_recovery(scratch: Path) -> None:
    disk, used, sealed = scratch / "disk.raw", scratch / "used.qcow2", scratch / "sealed.qcow2"
    await output_of("qemu-img", "convert", "-O", "raw", str(guest_image()), str(disk))
    await plant(disk, scratch)
    await output_of("qemu-img", "convert", "-O", "qcow2", str(disk), str(used))
    assert [name for name, level in (await unwell(used)).items() if level == "fault"] == [
        "machine-id", "SSH host keys", "random seed", "keys of users",
    ]  # fmt: skip

    await output_of(*GPUD, "image", "seal", str(used), "--output", str(sealed), timeout_s=300)

    assert await unwell(sealed) == {"NVIDIA driver": "note", "containers": "note"}
    await output_of("qemu-img", "convert", "-O", "raw", str(sealed), str(disk))
    count = ["sh", "-c", 'grep -a -c -F "$1" "$2" || [ $? -eq 1 ]', "-"]
    assert (await output_of(*count, SECRET, str(disk))).strip() == "0"


@pytest.mark.parametrize(
    ("listed", "signature", "told"),
    [
        ("0" * 64 + "  cloud.img\n", "", "cloud.img: wrong checksum"),
        ("0" * 64 + "  another.img\n", "", "does not know cloud.img"),
        ("", "sums", "bad signature"),
    ],
)
async def test_a_download_that_is_not_what_its_publisher_says_is_refused(
    scratch: Path, listed: str, signature: str, told: str
) -> None:
    (scratch / "cloud.img").write_bytes(b"not it")
    (scratch / "sums").write_text(listed)
    (scratch / "keys").write_bytes(b"")
    at = f"file://{scratch}"
    (scratch / "own.profile").write_text(
        f"IMAGE_URL={at}/cloud.img\nSUMS_URL={at}/sums\nSUMS_PROGRAM=sha256sum\n"
        f"SUMS_SIGNATURE_URL={signature and at + '/' + signature}\nSUMS_KEYRING={scratch}/keys\n"
    )

    with pytest.raises(AssertionError, match=told):
        await recipe(scratch / "own.profile", scratch / "golden.qcow2", TMPDIR=scratch)

    assert not (scratch / "golden.qcow2").exists()


@pytest.mark.long
@pytest.mark.timeout(BUILD_TIMEOUT_S + 900)
async def test_the_recipe_makes_an_image_that_fills_an_order(
    start_server: ServerFactory, scratch: Path
) -> None:
    """With packages of Debian's in the place of NVIDIA's, which are not everywhere to be had."""
    golden = scratch / "golden.qcow2"
    said = await recipe(
        "debian-12-plain", golden, IMAGE=guest_image(), EXTRA="hello", DISK_GIB=4, CPUS=2,
        MEMORY_MIB=1024, TIMEOUT_S=BUILD_TIMEOUT_S, TMPDIR=scratch,
    )  # fmt: skip

    assert said.startswith(f"gpud image add {golden} --name debian-12-plain --sha256 ")
    assert await unwell(golden) == {"NVIDIA driver": "note", "containers": "note"}
    server, caller = await start_server(golden, guest={"image": "golden"})
    accepted = await caller.order(
        instance_id="golden-1", gpu_type="h100_sxm", gpu_count=1, tier="on_demand",
        startup_script=SCRIPT,
    )  # fmt: skip
    await caller.wait_for(accepted["upstream_id"], "running", 600)
    async with asyncio.timeout(300):
        while (code := await exit_code(server, accepted["upstream_id"])) is None:
            await asyncio.sleep(3)
    assert code == 0
    listed = json.loads(await server.gpud("image", "list", "--json"))
    assert [one["in_use_by"] for one in listed] == [1]
