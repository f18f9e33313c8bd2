"""What the command says when the daemon is not what it hoped for."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gpud import adminclient
from gpud.errors import Code, GpudError

Serve = Callable[..., Path]


@pytest.fixture
def asked() -> list[str]:
    """The paths that the daemon was asked for."""
    return []


@pytest.fixture
def serve(tmp_path: Path, asked: list[str]) -> Serve:
    """A daemon that gives fixed answers, hanging up after each, and is gone after the last."""

    def start(*answers: bytes) -> Path:
        path = tmp_path / "s"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                asked.append(connection.recv(65536).split()[1].decode())
                connection.sendall(answer)
                connection.close()
            listener.close()

        threading.Thread(target=serve, daemon=True).start()
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
    body = b'{"code": "gpu_unusable", "detail": "GPU 3 does not answer", "hint": "look at it"}'
    error = refusal(serve(response("500 Internal Server Error", body)))
    assert error.code is Code.GPU_UNUSABLE
    assert str(error) == "GPU 3 does not answer (look at it)"


@pytest.mark.parametrize("body", [b"oops", b"[]", b"{}", b'{"code": "new", "detail": "x"}'])
def test_a_refusal_that_makes_no_sense_is_no_traceback(serve: Serve, body: bytes) -> None:
    error = refusal(serve(response("500 Internal Server Error", body)))
    assert error.detail == "the daemon answered 500; see its log"


def test_an_answer_that_breaks_off_is_no_traceback(serve: Serve) -> None:
    assert "broke off" in refusal(serve(response("200 OK", b'{"a"', length=100))).detail


def test_a_daemon_that_does_not_answer_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adminclient, "_ANSWER_S", 0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        error = refusal(tmp_path / "silent")
    assert "does not answer in time" in error.detail
    assert "journalctl -u gpud" in error.hint


def events(*ids: int) -> bytes:
    body = json.dumps({"events": [{"id": number} for number in ids]})
    return response("200 OK", body.encode())


def test_events_are_followed_over_a_restart_of_the_daemon(
    serve: Serve, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adminclient, "_POLL_S", 0.001)
    told: list[str] = []

    def say(what: str) -> None:
        told.append(what)
        if "does not answer" in what:
            serve(events(9), events(7, 8, 9))

    socket_path = serve(events(5), events(), events(6))
    coming = adminclient.follow_events(socket_path, {"gpu": "0000:41:00.0"}, 4, say)
    assert [next(coming)["id"] for _ in range(5)] == [5, 6, 7, 8, 9]
    assert told == ["the daemon does not answer; waiting for it", "the daemon answers again"]
    of_gpu = "/events?gpu=0000:41:00.0&after="
    assert asked == [*(f"{of_gpu}{after}" for after in (4, 5, 5)), "/events?limit=1", f"{of_gpu}6"]


@pytest.mark.parametrize(("newest", "after"), [((3,), 3), ((), 0)])
def test_events_are_followed_into_an_older_record_too(
    serve: Serve,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    newest: tuple[int, ...],
    after: int,
) -> None:
    monkeypatch.setattr(adminclient, "_POLL_S", 0.001)

    def say(what: str) -> None:
        if "does not answer" in what:
            serve(events(*newest), events(4))

    coming = adminclient.follow_events(serve(events(100)), {}, 99, say)
    assert [next(coming)["id"] for _ in range(2)] == [100, 4]
    assert asked[-1] == f"/events?after={after}"


def test_following_ends_when_the_daemon_refuses(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adminclient, "_POLL_S", 0)
    body = b'{"code": "instance_not_found", "detail": "there is no instance x", "hint": ""}'
    socket_path = serve(response("404 Not Found", body))
    with pytest.raises(GpudError, match="no instance x"):
        next(adminclient.follow_events(socket_path, {}, 0, print))
