"""What a run starts from: the server's image, the guests' images, and the disk with gpud itself.

The first two take minutes to build and are kept, under names that tell what they were made from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tomllib
from pathlib import Path

from tests.lab.mishaps import nvml_answers
from tests.machine.processes import output_of
from tests.machine.server import test_image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

_PAYLOAD_FILES = ("install.sh", "70-gpud-local.rules")


async def server_image(cache: Path) -> Path:
    """The directory with the server's image; built where this version of it is not there yet."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = "".join(f"{line}\n" for line in project["project"]["dependencies"])
    script = HERE / "build.sh"
    built = cache / f"lab-server-{_digest(script.read_bytes(), requirements.encode())}"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        listed = cache / f"lab-requirements.{os.getpid()}"
        listed.write_text(requirements)
        await output_of(str(script), str(listed), str(built), timeout_s=1200)
        listed.unlink()
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
    """A disk with all that is installed in the server: gpud's wheel, its files, its configuration.

    Args:
        directory: Where to make it.
        config: The configuration's text.
        jwks: The token issuer's public keys.
        images: The guests' images.
    """
    content = directory / "payload"
    content.mkdir()
    await output_of(sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "wheel",
                    "--no-deps", "--wheel-dir", str(content), str(ROOT), timeout_s=300)  # fmt: skip
    shutil.copytree(ROOT / "systemd", content / "systemd")
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


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
