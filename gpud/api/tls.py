"""The certificate that callers are shown, read whole and checked before it is used."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from gpud.config import Tls
from gpud.errors import Code, GpudError

FileStamp = tuple[int, int, int]
"""Modification time, inode and size: together they tell a file that was written or replaced."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate chain with its key, ready for handshakes.

    A renewed one gets a context of its own: OpenSSL replaces certificate and key of a live context one
    after the other, and a pair that does not match would leave it without a key.

    Attributes:
        files: Where it was read from.
        context: For new connections.
        expires_at: Seconds since the epoch.
        stamps: What the files were like just before they were read.
    """

    files: Tls
    context: ssl.SSLContext
    expires_at: float
    stamps: tuple[FileStamp, ...]

    @classmethod
    def read(cls, files: Tls) -> Certificate:
        """Read it.

        Raises:
            GpudError: ``CONFIG_INVALID``: the files cannot be read or do not fit together.
        """
        stamps = file_stamps(files)
        return cls(files, tls_context(files), certificate_expires_at(files), stamps)


def file_stamps(files: Tls) -> tuple[FileStamp, ...]:
    """What the files are like now, links followed; a file that cannot be looked at has none."""
    return tuple(_stamp(path) for path in (files.certificate_file, files.key_file))


def _stamp(path: Path) -> FileStamp:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_ino, found.st_size)


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Server-side TLS from the configured files.

    Raises:
        GpudError: ``CONFIG_INVALID``: the files cannot be read or do not fit together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password OpenSSL would ask for an encrypted key's on the terminal, and wait.
        context.load_cert_chain(tls.certificate_file, tls.key_file, password="")
    except (OSError, ssl.SSLError) as error:
        raise GpudError(
            Code.CONFIG_INVALID,
            f"server.tls: {tls.certificate_file} and {tls.key_file} cannot be used: {error}",
        ) from error
    return context


def certificate_expires_at(tls: Tls) -> float:
    """When the certificate that callers see expires, in seconds since the epoch.

    Raises:
        GpudError: ``CONFIG_INVALID``: it cannot be read.
    """
    try:
        # The first of the file is the server's own (RFC 8446, section 4.4.2).
        own = x509.load_pem_x509_certificates(tls.certificate_file.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise GpudError(
            Code.CONFIG_INVALID, f"server.tls: {tls.certificate_file} cannot be read: {error}"
        ) from error
    return own.not_valid_after_utc.timestamp()
