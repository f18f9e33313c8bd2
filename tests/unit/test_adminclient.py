"""What the command says when the daemon is not what it hoped for."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gpud import adminclient
from gpud.errors import Code, GpudError

Serve = Callable[[bytes], Path]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """A daemon that gives one fixed answer and hangs up."""

    def start(answer: bytes) -> Path:
        path = tmp_path / "s"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def once() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(answer)
            connection.close()
            listener.close()

        threading.Thread(target=once, daemon=True).start()
        return path

    return start


def response(status: str, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nContent-Type: application/json\r\n\r\n"
    return head.encode() + body


def refusal(socket_path: Path) -> GpudError:
    with pytest.raises(GpudError) as caught:
        adminclient.get(socket_path, "/instances")
    return caught.value


def test_an_answer_is_json(serve: Serve) -> None:
    assert adminclient.get(serve(response("200 OK", b'{"a": 1}')), "/x") == {"a": 1}


def test_a_daemon_that_is_down_is_told_with_what_to_do(tmp_path: Path) -> None:
    error = refusal(tmp_path / "gone")
    assert "no daemon answers" in error.detail
    assert "systemctl status gpud" in error.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open any socket")
def test_a_socket_of_somebody_else_is_told_apart(serve: Serve) -> None:
    path = serve(response("200 OK", b"{}"))
    path.chmod(0)
    assert "as root" in refusal(path).hint


def test_a_refusal_is_told_in_the_daemons_words(serve: Serve) -> None:
    body = b'{"code": "instance_not_found", "detail": "there is no instance x"}'
    error = refusal(serve(response("404 Not Found", body)))
    assert (error.code, error.detail) == (Code.INSTANCE_NOT_FOUND, "there is no instance x")


@pytest.mark.parametrize("body", [b"oops", b"[]", b"{}", b'{"code": "new", "detail": "x"}'])
def test_a_refusal_that_makes_no_sense_is_no_traceback(serve: Serve, body: bytes) -> None:
    error = refusal(serve(response("500 Internal Server Error", body)))
    assert error.detail == "the daemon answered 500; see its log"


def test_an_answer_that_breaks_off_is_no_traceback(serve: Serve) -> None:
    assert "broke off" in refusal(serve(response("200 OK", b'{"a"', length=100))).detail
