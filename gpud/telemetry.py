"""Logs and metrics: what the daemon says of itself. Never a token, a script or a key."""

from __future__ import annotations

import logging
import sys

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from structlog.typing import EventDict, Processor, WrappedLogger

from gpud.config import Log

_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)


def set_up_logging(log: Log) -> None:
    """Send structured events to standard error: JSON for journald and files, text for a person."""
    as_text = log.format == "text" or (log.format == "auto" and sys.stderr.isatty())
    renderer: Processor = (
        structlog.dev.ConsoleRenderer() if as_text else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _exceptions_without_values,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[log.level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


def _exceptions_without_values(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Render a traceback as places and types only: an exception's text may quote its input."""
    error = event.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()[1]
    if isinstance(error, BaseException):
        event["exception"] = type(error).__name__
        frames = []
        trace = error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            frames.append(f"{code.co_filename}:{trace.tb_lineno} {code.co_name}")
            trace = trace.tb_next
        event["traceback"] = frames
    return event


class Metrics:
    """Every metric gpud exports, in a registry of its own. Label values are from closed sets."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gpud_api_requests", "API requests by route, method and status.",
            ["route", "method", "status"], registry=self.registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "gpud_api_request_seconds", "Time to answer an API request.",
            ["route"], buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30),
            registry=self.registry,
        )  # fmt: skip
        self.token_failures = Counter(
            "gpud_token_failures", "Refused bearer tokens by reason.",
            ["reason"], registry=self.registry,
        )  # fmt: skip
        self.orders = Counter(
            "gpud_orders", "Orders by outcome: accepted, replayed, or the code of the refusal.",
            ["outcome"], registry=self.registry,
        )  # fmt: skip
        self.capacity_refusals = Counter(
            "gpud_capacity_refusals", "Orders refused for lack of something, by what was short.",
            ["shortage"], registry=self.registry,
        )  # fmt: skip
        self.unknown_fields = Counter(
            "gpud_unknown_request_fields", "Fields in order bodies that gpud does not know.",
            registry=self.registry,
        )  # fmt: skip
        self.instances = Gauge(
            "gpud_instances", "Live instances by status.",
            ["status"], registry=self.registry,
        )  # fmt: skip
        self.gpus = Gauge(
            "gpud_gpus", "Cards by GPU type (none: not sold by GPU.ai) and state.",
            ["gpu_type", "state"], registry=self.registry,
        )  # fmt: skip
        self.quarantines = Counter(
            "gpud_gpu_quarantines", "Cards that did not come back from an instance as they must.",
            registry=self.registry,
        )  # fmt: skip
        self.step_seconds = Histogram(
            "gpud_step_seconds", "Time an instance spent in a step before moving on.",
            ["step"], buckets=_BUCKETS_S, registry=self.registry,
        )  # fmt: skip
        self.step_failures = Counter(
            "gpud_step_failures", "Attempts at a step that failed, by code.",
            ["step", "code"], registry=self.registry,
        )  # fmt: skip
        self.order_to_running_seconds = Histogram(
            "gpud_order_to_running_seconds", "From an accepted order to its script being started.",
            ["gpu_type"], buckets=_BUCKETS_S, registry=self.registry,
        )  # fmt: skip
        self.script_exits = Counter(
            "gpud_startup_script_exits", "Startup scripts that ended, by whether they succeeded.",
            ["result"], registry=self.registry,
        )  # fmt: skip
        self.guest_restarts = Counter(
            "gpud_guest_restarts", "Guests that ended by themselves and were started again.",
            registry=self.registry,
        )  # fmt: skip
        self.hypervisor_up = Gauge(
            "gpud_hypervisor_up", "1 while libvirt answers.", registry=self.registry
        )
        self.orphans = Counter(
            "gpud_orphans_removed", "Things of gpud's own found without an instance, by kind.",
            ["kind"], registry=self.registry,
        )  # fmt: skip
