"""What a run starts from: the server's image, the guests' images, and the disk with gpud itself.

The first two take minutes to build and are kept, under names that tell what they were made from.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from tests.lab.mishaps import nvml_answers
from tests.machine.processes import output_of
from tests.machine.server import test_image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

PACKAGE = "gpud.deb"
NEXT_PACKAGE = "gpud-next.deb"
NEXT_VERSION = "999"
_PAYLOAD_FILES = ("install.sh", "70-gpud-local.rules")


async def server_image(cache: Path) -> Path:
    """The directory with the server's image; built where this version of it is not there yet."""
    script = HERE / "build.sh"
    built = cache / f"lab-server-{_digest(script.read_bytes())}"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        await output_of(str(script), str(built), timeout_s=1200)
    return built


async def guest_images(server: Path, cache: Path) -> dict[str, Path]:
    """The guests' images by the names they get in gpud: a small one, and one with cloud-init."""
    base = test_image()
    whole = cache / f"lab-{base.stem}.qcow2"
    if not whole.exists():
        # Emulated, the server would take a minute more to check the sum of the plain file.
        part = whole.with_suffix(f".{os.getpid()}")
        await output_of("qemu-img", "convert", "-c", "-O", "qcow2",
                        "-o", "compression_type=zstd", str(base), str(part))  # fmt: skip
        part.replace(whole)
    parts = (HERE / "guest.sh", HERE / "guest_init.sh")
    small = (
        cache / f"lab-guest-{_digest(server.name.encode(), *(p.read_bytes() for p in parts))}.raw"
    )
    if not small.exists():
        part = small.with_suffix(f".{os.getpid()}")
        await output_of(str(parts[0]), str(server), str(part))
        part.replace(small)
    return {"small": small, "whole": whole}


async def payload(directory: Path, config: str, jwks: str, images: dict[str, Path]) -> Path:
    """A disk with all that is installed: gpud's package and the next one, its configuration.

    Args:
        directory: Where to make it.
        config: The configuration's text.
        jwks: The token issuer's public keys.
        images: The guests' images.
    """
    content = directory / "payload"
    content.mkdir()
    await _packages(content)
    for name in _PAYLOAD_FILES:
        shutil.copy(HERE / name, content)
    nvml = str(ROOT / "tests/fake_nvml/library.py")
    await output_of(sys.executable, nvml, str(content / "nvml"))
    (content / "gpud.yaml").write_text(config)
    (content / "fake-nvml.txt").write_text(nvml_answers())
    (content / "issuer.jwks").write_text(jwks)
    for name, image in images.items():
        shutil.copy(image, content / f"{name}{image.suffix}")
    disk = directory / "payload.img"
    size_mib = sum(path.stat().st_size for path in content.rglob("*")) // 2**20 + 32
    await output_of("/usr/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-L", "payload",
                    "-d", str(content), str(disk), f"{size_mib}M")  # fmt: skip
    shutil.rmtree(content)
    return disk


async def _packages(directory: Path) -> None:
    """Gpud's package, and the same once more as a newer version."""
    built = await output_of(str(ROOT / "systemd/deb/build.sh"), str(directory), timeout_s=300)
    package = Path(built.strip()).rename(directory / PACKAGE)
    tree = directory / "unpacked"
    await output_of("dpkg-deb", "--raw-extract", str(package), str(tree))
    control = tree / "DEBIAN/control"
    newer = re.sub(
        "^Version: .*", f"Version: {NEXT_VERSION}", control.read_text(), flags=re.MULTILINE
    )
    control.write_text(newer)
    await output_of("dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", str(tree),
                    str(directory / NEXT_PACKAGE))  # fmt: skip
    shutil.rmtree(tree)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
