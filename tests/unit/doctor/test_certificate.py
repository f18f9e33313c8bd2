"""The certificate that GPU.ai is shown."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from gpud.config import Tls
from gpud.doctor.account import Account
from gpud.doctor.certificate import certificate
from gpud.doctor.check import Level
from tests.unit.doctor.parts import only

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """A certificate that is valid from a day before NOW to a hundred days after it."""
    directory = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gpu.example.com")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + 100 * DAY)
        .sign(key, hashes.SHA256())
    )
    tls = Tls(certificate_file=directory / "tls.crt", key_file=directory / "tls.key")
    tls.certificate_file.write_bytes(made.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    tls.key_file.write_bytes(pem)
    tls.key_file.chmod(0o640)
    return tls


@pytest.mark.parametrize(
    ("later", "worst"),
    [
        (timedelta(), Level.OK),
        (90 * DAY, Level.WARNING),
        (100 * DAY, Level.FAULT),
        (-2 * DAY, Level.FAULT),
    ],
)
def test_a_certificate_has_its_time(files: Tls, later: timedelta, worst: Level) -> None:
    assert only(certificate(files, NOW + later, None))[0] is worst


def test_tls_that_ends_elsewhere_needs_none() -> None:
    assert only(certificate(None, NOW, None))[0] is Level.OK


def test_a_key_of_another_certificate_is_a_fault(files: Tls, tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    key_file = tmp_path / "other.key"
    key_file.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    found = only(certificate(files.model_copy(update={"key_file": key_file}), NOW, None))
    assert found[0] is Level.FAULT
    assert found[2].startswith("server.tls")


def test_missing_files_are_a_fault(tmp_path: Path) -> None:
    tls = Tls(certificate_file=tmp_path / "no.crt", key_file=tmp_path / "no.key")
    assert only(certificate(tls, NOW, None))[0] is Level.FAULT


def test_a_key_that_may_not_be_read_is_left_to_the_daemons_user(
    files: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)
    found = only(certificate(files, NOW, None))
    assert (found[0], found[2]) == (Level.NOTE, "sudo -u gpud gpud doctor")


def test_a_key_open_to_everybody_is_a_warning(files: Tls) -> None:
    files.key_file.chmod(0o644)
    try:
        found = list(certificate(files, NOW, None))
    finally:
        files.key_file.chmod(0o640)
    assert [one.level for one in found] == [Level.OK, Level.WARNING]


def test_a_key_that_keeps_the_daemon_out_is_a_fault(files: Tls) -> None:
    daemon = Account("gpud", 64000, frozenset({64000}))
    found = list(certificate(files, NOW, daemon))
    assert [one.level for one in found] == [Level.OK, Level.FAULT]
    assert found[1].mend == f"chgrp gpud {files.key_file} && chmod 0640 {files.key_file}"
    group = frozenset({files.key_file.stat().st_gid})
    assert only(certificate(files, NOW, Account("gpud", 64000, group)))[0] is Level.OK
