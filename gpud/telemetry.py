"""Logs and metrics: what the daemon says of itself. Never a token, a script or a key."""

from __future__ import annotations

import contextlib
import logging
import sys

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from structlog.typing import EventDict, Processor, WrappedLogger

from gpud.config import Log
from gpud.errors import Code
from gpud.model import RELEASE_STEPS, Step
from gpud.tally import RequestTally

_ANSWER_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STEP_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 900)
_ORDER_BUCKETS_S = (5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 450, 600, 900)

_ORDER_OUTCOMES = ("accepted", "replayed", *(code.value for code in (
    Code.INVALID_JSON, Code.INVALID_REQUEST, Code.INSTANCE_ID_REUSED, Code.NO_CAPACITY,
    Code.NOT_OFFERED, Code.HYPERVISOR_UNAVAILABLE,
)))  # fmt: skip


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
        logger_factory=lambda *_: _Lines(),
        cache_logger_on_first_use=False,  # or a reload's level would not reach who has logged before
    )


class _Lines(structlog.WriteLogger):
    """Writes lines to standard error. One that cannot be written is lost, and nothing else.

    Standard error may lie on a full disk, or its reader may be gone; an error out of a log call would end
    whatever was about to tell something, such as the task that drives an order.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def msg(self, message: str) -> None:
        """Write a line."""
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


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
    """What is counted where it happens, in a registry of its own; :mod:`gpud.watch` adds to its page
    what is true at the moment.

    Label values are from closed sets: no caller and no guest can make one up. Names and units keep
    Prometheus' conventions (prometheus.io/docs/practices/naming).
    """  # noqa: D205 - one sentence

    def __init__(self) -> None:
        # When each series began: as many series again, for what Prometheus finds out by itself.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._count_api()
        self._count_orders()
        self._count_steps()
        self._count_gpus()
        self._count_libvirt()

    def _count_api(self) -> None:
        self.requests = RequestTally(_ANSWER_BUCKETS_S)
        self.registry.register(self.requests)
        self.token_failures = Counter(
            "gpud_token_failures", "Refused bearer tokens by reason.",
            ["reason"], registry=self.registry,
        )  # fmt: skip
        self.unknown_fields = Counter(
            "gpud_unknown_request_fields", "Fields in order bodies that gpud does not know.",
            registry=self.registry,
        )  # fmt: skip

    def _count_orders(self) -> None:
        self.orders = Counter(
            "gpud_orders", "Orders by outcome: accepted, replayed, or the code of the refusal.",
            ["outcome"], registry=self.registry,
        )  # fmt: skip
        for outcome in _ORDER_OUTCOMES:  # so that the first of each is seen as an increase
            self.orders.labels(outcome)
        self.gpu_claims = Counter(
            "gpud_gpu_claims", "GPUs that accepted orders have claimed.",
            ["gpu_type", "tier"], registry=self.registry,
        )  # fmt: skip
        self.capacity_refusals = Counter(
            "gpud_capacity_refusals", "Orders refused for lack of something, by what was short.",
            ["shortage"], registry=self.registry,
        )  # fmt: skip
        self.earnings_usd = Counter(
            "gpud_earnings_usd", "What instances have earned since the first one, by the record.",
            ["gpu_type", "tier"], registry=self.registry,
        )  # fmt: skip

    def _count_steps(self) -> None:
        self.step_seconds = Histogram(
            "gpud_step_seconds", "Time an instance spent in a step before moving on.",
            ["step"], buckets=_STEP_BUCKETS_S, registry=self.registry,
        )  # fmt: skip
        self.step_failures = Counter(
            "gpud_step_failures", "Attempts at a step that failed, by code.",
            ["step", "code"], registry=self.registry,
        )  # fmt: skip
        self.order_failures = Counter(
            "gpud_order_failures", "Orders that were given up, by the step that they failed in.",
            ["step"], registry=self.registry,
        )  # fmt: skip
        for step in set(Step) - RELEASE_STEPS - {Step.ENDED}:  # those are never given up
            self.order_failures.labels(step.value)
        self.order_to_running_seconds = Histogram(
            "gpud_order_to_running_seconds", "From an accepted order to its script being started.",
            ["gpu_type"], buckets=_ORDER_BUCKETS_S, registry=self.registry,
        )  # fmt: skip
        self.script_exits = Counter(
            "gpud_startup_script_exits", "Startup scripts that ended, by whether they succeeded.",
            ["result"], registry=self.registry,
        )  # fmt: skip
        for result in ("ok", "failed"):
            self.script_exits.labels(result)
        self.guest_restarts = Counter(
            "gpud_guest_restarts", "Guests that ended by themselves and were started again.",
            registry=self.registry,
        )  # fmt: skip
        self.orphans = Counter(
            "gpud_orphans_removed", "Things of gpud's own found without an instance, by kind.",
            ["kind"], registry=self.registry,
        )  # fmt: skip

    def _count_gpus(self) -> None:
        self.quarantines = Counter(
            "gpud_gpu_quarantines", "Cards that did not come back from an instance as they must.",
            registry=self.registry,
        )  # fmt: skip
        self.resets = Counter(
            "gpud_gpu_resets",
            "Resets of PCI functions by method (unknown: none did it) and outcome: ok, failed, or"
            " unproven where the card was not found sane afterwards.",
            ["method", "outcome"], registry=self.registry,
        )  # fmt: skip

    def _count_libvirt(self) -> None:
        self.libvirt_calls = Counter(
            "gpud_libvirt_calls", "Calls of libvirt by outcome: ok, failed, unavailable, timeout.",
            ["call", "outcome"], registry=self.registry,
        )  # fmt: skip
        self.libvirt_call_seconds = Histogram(
            "gpud_libvirt_call_seconds", "Time that a call of libvirt took, its turn included.",
            ["call"], buckets=_ANSWER_BUCKETS_S, registry=self.registry,
        )  # fmt: skip
