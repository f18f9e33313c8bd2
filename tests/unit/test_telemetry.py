"""What logs show, and above all what they do not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
import structlog

from gpud.config import Log
from gpud.telemetry import Metrics, set_up_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_an_event_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(Log())
    structlog.get_logger().info("order accepted", instance="i-1")
    (event,) = logged(capsys)
    assert event["event"] == "order accepted"
    assert event["instance"] == "i-1"
    assert event["level"] == "info"
    assert "timestamp" in event


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(Log(format="text"))
    structlog.get_logger().info("order accepted", instance="i-1")
    text = capsys.readouterr().err
    assert "order accepted" in text
    assert not text.startswith("{")


def test_level_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(Log(level="warning"))
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    assert [event["event"] for event in logged(capsys)] == ["loud"]


def test_another_level_holds_for_who_has_logged_before(capsys: pytest.CaptureFixture[str]) -> None:
    log = structlog.get_logger()
    set_up_logging(Log(level="warning"))
    log.warning("one")
    set_up_logging(Log(level="debug"))
    log.debug("two")
    assert [event["event"] for event in logged(capsys)] == ["one", "two"]


def test_a_line_that_cannot_be_written_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(OSError), open("/dev/full", "w") as full:  # noqa: PTH123 - it fails at close, too
        monkeypatch.setattr(sys, "stderr", full)
        set_up_logging(Log())
        log = structlog.get_logger()
        for tell in (log.info, log.warning, log.error):
            tell("disk full")
        reached = True
    assert reached


def boom(secret: str) -> None:
    raise ValueError(f"cannot parse {secret!r}")


def test_a_traceback_shows_places_but_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(Log())
    log = structlog.get_logger()
    try:
        boom("s3cret")
    except ValueError as error:
        log.warning("failed", exc_info=error)
        log.exception("failed again")
    events = logged(capsys)
    assert len(events) == 2
    for event in events:
        assert event["exception"] == "ValueError"
        assert "boom" in str(event["traceback"])
        assert "s3cret" not in json.dumps(event)


def test_two_sets_of_metrics_do_not_collide() -> None:
    Metrics().orders.labels("accepted").inc()
    assert Metrics().orders.labels("accepted")._value.get() == 0
