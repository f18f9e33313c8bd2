"""Compiles the fake NVML: ``build()`` for tests, ``python library.py DIRECTORY`` for a whole server."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")
SONAME = "libnvidia-ml.so.1"
_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{SONAME}"]
_WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def build(missing: Sequence[str] = ()) -> Path:
    """Compile the library, unless this version of it is there already.

    Args:
        missing: C functions to leave out, as an older driver's library does.

    Returns:
        The directory it is in, for ``LD_LIBRARY_PATH``.
    """
    arguments = [*_FLAGS, *_WARNINGS, *(f"-D{name}=without_{name}" for name in missing)]
    version = hashlib.sha256(SOURCE.read_bytes() + " ".join(arguments).encode()).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"gpud-fake-nvml-{os.getuid()}" / version
    if not (directory / SONAME).exists():
        compile_to(directory, arguments)
    return directory


def compile_to(directory: Path, arguments: Sequence[str] = (*_FLAGS, *_WARNINGS)) -> None:
    """Compile the library into ``directory``, in one move: others may be doing the same."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = directory / f"{SONAME}.{os.getpid()}"
    subprocess.run(["gcc", *arguments, "-o", fresh, SOURCE], check=True)
    fresh.replace(directory / SONAME)


if __name__ == "__main__":
    compile_to(Path(sys.argv[1]))
