"""Writes the cloud-init seed: an ISO image with the label and the names that NoCloud looks for.

Source: cloud-init's documentation of the NoCloud datasource (a file system labelled ``cidata`` with
``user-data``, ``meta-data`` and, optionally, ``network-config`` at its root).
"""

from __future__ import annotations

import asyncio
import io
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pycdlib import PyCdlib

from gpud.errors import Code, GpudError
from gpud.guest.durable import replacing

VOLUME_LABEL: Final = "cidata"

_ROCK_RIDGE: Final = "1.09"
_JOLIET_LEVEL: Final = 3
_INTERCHANGE_LEVEL: Final = 3
_FILE_MODE: Final = stat.S_IFREG | 0o400
"""Mode inside the image: the guest's root alone."""


async def write_seed(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a seed image, mode 0600 since it holds secrets; an older one is replaced.

    The content decides all bytes but the dates, which pycdlib takes from the clock.

    Args:
        path: The image.
        files: Names at the image's root, exactly as the guest shall see them, and their content.

    Raises:
        GpudError: ``state_unusable`` when it cannot be written.
    """
    try:
        await asyncio.to_thread(_write, path, files)
    except OSError as error:
        raise GpudError(
            Code.STATE_UNUSABLE, f"the seed {path} cannot be written: {error.strerror}"
        ) from error


def _write(path: Path, files: Mapping[str, bytes]) -> None:
    image = PyCdlib()
    image.new(
        interchange_level=_INTERCHANGE_LEVEL,
        vol_ident=VOLUME_LABEL,
        rock_ridge=_ROCK_RIDGE,  # Linux takes the names from here
        joliet=_JOLIET_LEVEL,  # other systems from here
    )
    try:
        for number, (name, content) in enumerate(sorted(files.items())):
            image.add_fp(
                io.BytesIO(content),
                len(content),
                # ISO 9660 itself knows no lower case and no hyphen; this name is never looked at.
                iso_path=f"/FILE{number}.;1",
                rr_name=name,
                joliet_path=f"/{name}",
                file_mode=_FILE_MODE,
            )
        with replacing(path, mode=0o600) as stream:
            image.write_fp(stream)
    finally:
        image.close()
