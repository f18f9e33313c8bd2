"""Reads a secret from where the config says it lies, and refuses one that others could read too."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from gpud.config import SecretSource
from gpud.errors import Code, GpudError

_MAX_BYTES: Final = 65536
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Non-blocking, so that a FIFO in the secret's place is reported instead of waited for."""


def read_secret(source: SecretSource, environ: Mapping[str, str]) -> str:
    """Read a secret; one line ending at its end is not part of it.

    Args:
        source: The file, or the systemd credential's name.
        environ: Where systemd tells the directory of credentials (systemd.exec(5),
            ``$CREDENTIALS_DIRECTORY``).

    Raises:
        GpudError: ``CONFIG_INVALID``; the secret's content is never part of the text.
    """
    path = _path(source, environ)
    try:
        content = _content(path)
    except OSError as error:
        raise _unusable(path, error.strerror or "cannot be read") from error
    secret = _text(content)
    if secret is None:
        raise _unusable(path, "is not UTF-8 text")
    if not secret.strip():
        raise _unusable(path, "is empty")
    return secret


def _path(source: SecretSource, environ: Mapping[str, str]) -> Path:
    if source.file is not None:
        return source.file
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise GpudError(
            Code.CONFIG_INVALID,
            f"the systemd credential {source.credential} was not handed to gpud",
            hint="name it in the unit with LoadCredential= or LoadCredentialEncrypted=",
        )
    return Path(directory) / str(source.credential)


def _content(path: Path) -> bytes:
    descriptor = os.open(path, _OPEN_FLAGS)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _unusable(path, "is not a regular file")
        if status.st_mode & stat.S_IRWXO:
            raise _unusable(path, "is open to every user of this host", f"chmod o-rwx {path}")
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise _unusable(path, f"is larger than {_MAX_BYTES} bytes")
    return content


def _text(content: bytes) -> str | None:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:  # its text would quote the content
        return None
    return text.removesuffix("\n").removesuffix("\r")


def _unusable(path: Path, what: str, hint: str = "") -> GpudError:
    return GpudError(Code.CONFIG_INVALID, f"secret file {path}: {what}", hint=hint)
