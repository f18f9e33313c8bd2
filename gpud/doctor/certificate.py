"""Check of the certificate that GPU.ai is shown."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from gpud.api.tls import tls_context
from gpud.config import Tls
from gpud.doctor.account import READ, Account
from gpud.doctor.check import Check, Group, Verdict
from gpud.errors import GpudError

_FILES: Final = Check(Group.CLOCK, "certificate")
_SECRECY: Final = Check(Group.CLOCK, "TLS key")
_SOON: Final = timedelta(days=14)


def certificate(tls: Tls | None, now: datetime, daemon: Account | None) -> Iterator[Verdict]:
    """Whether the chain and its key fit together, and are of this time.

    Args:
        tls: The files; None where TLS ends elsewhere.
        now: With a time zone.
        daemon: Who the daemon runs as, where that is known.
    """
    if tls is None:
        yield _FILES.ok("none; TLS ends elsewhere (server.tls)")
        return
    unreadable = [one for one in (tls.certificate_file, tls.key_file) if _hidden(one)]
    if unreadable:
        yield _FILES.note(f"{unreadable[0]} cannot be read by who asks", "sudo -u gpud gpud doctor")
        return
    try:
        tls_context(tls)
        chain = x509.load_pem_x509_certificates(tls.certificate_file.read_bytes())
    except GpudError as error:
        yield _FILES.failed(
            error, "server.tls: certificate_file, the whole chain, and its key_file"
        )
        return
    yield validity(chain, now)
    if daemon is not None and not daemon.may(READ, tls.key_file.stat()):
        mend = f"chgrp gpud {tls.key_file} && chmod 0640 {tls.key_file}"
        yield _SECRECY.fault(f"{tls.key_file} keeps the daemon's user {daemon.name} out", mend)
    elif stat.S_IMODE(tls.key_file.stat().st_mode) & stat.S_IRWXO:
        mend = f"chown root:gpud {tls.key_file} && chmod 0640 {tls.key_file}"
        yield _SECRECY.warning(f"{tls.key_file} is open to every user of this host", mend)


def validity(chain: list[x509.Certificate], now: datetime) -> Verdict:
    """Whether a chain is valid now, and for a while: the first of it to expire counts."""
    last = min(one.not_valid_after_utc for one in chain)
    first = max(one.not_valid_before_utc for one in chain)
    until = f"{last:%Y-%m-%d %H:%M} UTC"
    renew = "renew it; gpud notices by itself within a minute"
    if now >= last:
        return _FILES.fault(f"expired on {until}", renew)
    if now < first:
        return _FILES.fault(f"not valid before {first:%Y-%m-%d %H:%M} UTC", "see the clock above")
    if last - now < _SOON:
        return _FILES.warning(f"expires in {(last - now).days} days, on {until}", renew)
    return _FILES.ok(f"fits its key, valid until {until}")


def _hidden(file: Path) -> bool:
    try:
        file.open("rb").close()
    except PermissionError:
        return True
    except OSError:  # told by who uses it
        return False
    return False
