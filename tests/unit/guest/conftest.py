"""Real disk images, made by the real qemu-img."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

MakeImage = Callable[..., Path]


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    """Make an image file with qemu-img's own options, its data filled with one byte."""

    def make(
        name: str, *options: str, size: str = "2M", image_format: str = "qcow2", fill: int = 0
    ) -> Path:
        path = tmp_path / name
        run = ["qemu-img", "create", "-q", "-f", image_format, *options, str(path), size]
        subprocess.run(run, check=True, cwd=tmp_path)
        if fill:
            write = ["qemu-io", "-f", image_format, "-c", f"write -q -P {fill} 0 64k", str(path)]
            subprocess.run(write, check=True, cwd=tmp_path)
        return path

    return make
