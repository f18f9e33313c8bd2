"""Secrets are read from files and credentials, and never told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpud.config import SecretSource
from gpud.errors import Code, GpudError
from gpud.secrets import read_secret


def write(path: Path, content: bytes, mode: int = 0o600) -> SecretSource:
    path.write_bytes(content)
    path.chmod(mode)
    return SecretSource(file=path)


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"hunter2", "hunter2"),
        (b"hunter2\n", "hunter2"),
        (b"hunter2\r\n", "hunter2"),
        (b"hunter2\n\n", "hunter2\n"),
        (b" h\xc3\xbcnter 2 ", " h\u00fcnter 2 "),
    ],
)
def test_one_line_ending_is_not_part_of_the_secret(
    tmp_path: Path, content: bytes, secret: str
) -> None:
    assert read_secret(write(tmp_path / "s", content), {}) == secret


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o660])
def test_owner_and_group_may_read_it(tmp_path: Path, mode: int) -> None:
    assert read_secret(write(tmp_path / "s", b"x", mode), {}) == "x"


@pytest.mark.parametrize(
    ("content", "mode", "what"),
    [
        (b"hunter2", 0o644, "is open to every user of this host (chmod o-rwx "),
        (b"hunter2", 0o602, "is open to every user of this host"),
        (b"", 0o600, "is empty"),
        (b" \n", 0o600, "is empty"),
        (b"hunter2\xff", 0o600, "is not UTF-8 text"),
        (b"hunter2" * 10_000, 0o600, "is larger than 65536 bytes"),
    ],
)
def test_an_unusable_file_is_told_without_its_content(
    tmp_path: Path, content: bytes, mode: int, what: str
) -> None:
    source = write(tmp_path / "s", content, mode)
    with pytest.raises(GpudError) as caught:
        read_secret(source, {})
    assert caught.value.code is Code.CONFIG_INVALID
    assert f"{tmp_path / 's'}: {what}" in str(caught.value)
    assert "hunter2" not in repr(caught.value) + str(caught.value)
    assert caught.value.__context__ is None


def test_an_absent_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(GpudError, match="absent: No such file or directory"):
        read_secret(SecretSource(file=tmp_path / "absent"), {})


def test_a_fifo_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(GpudError, match="is not a regular file"):
        read_secret(SecretSource(file=tmp_path / "fifo"), {})


def test_a_credential_lies_where_systemd_says(tmp_path: Path) -> None:
    write(tmp_path / "introspection", b"hunter2\n")
    source = SecretSource(credential="introspection")
    assert read_secret(source, {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == "hunter2"


def test_a_credential_that_was_not_handed_over_is_told() -> None:
    with pytest.raises(GpudError, match="credential introspection was not handed") as caught:
        read_secret(SecretSource(credential="introspection"), {})
    assert "LoadCredential" in caught.value.hint
