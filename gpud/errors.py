"""Every error gpud tells a caller or an operator, with its stable code.

A :class:`GpudError` carries one sentence on what happened, to which thing, and a hint on what to do.
The codes are part of the API: they appear in problem bodies (RFC 9457) and are listed in
``gpud/api/openapi.yaml``; a test holds the two lists together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """Stable error codes. Once published, a code keeps its meaning."""

    INVALID_JSON = "invalid_json"
    INVALID_REQUEST = "invalid_request"
    MISSING_TOKEN = "missing_token"  # noqa: S105 - a code, not a credential
    INVALID_TOKEN = "invalid_token"  # noqa: S105
    INSUFFICIENT_SCOPE = "insufficient_scope"
    NOT_FOUND = "not_found"
    INSTANCE_NOT_FOUND = "instance_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    REQUEST_TIMEOUT = "request_timeout"
    INSTANCE_ID_REUSED = "instance_id_reused"
    NO_CAPACITY = "no_capacity"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    NOT_OFFERED = "not_offered"
    RATE_LIMITED = "rate_limited"
    INTERNAL = "internal_error"
    TOO_SLOW = "too_slow"
    HYPERVISOR_UNAVAILABLE = "hypervisor_unavailable"
    AUTH_UNAVAILABLE = "auth_unavailable"
    RECORD_UNAVAILABLE = "record_unavailable"
    CONFIG_INVALID = "config_invalid"
    IMAGE_INVALID = "image_invalid"
    IMAGE_IN_USE = "image_in_use"
    STATE_UNUSABLE = "state_unusable"
    HOST_COMMAND_FAILED = "host_command_failed"
    GUEST_FAILED = "guest_failed"
    GPU_BUSY = "gpu_busy"
    GPU_UNUSABLE = "gpu_unusable"
    GPU_NOT_FOUND = "gpu_not_found"


HTTP_STATUS: dict[Code, int] = {
    Code.INVALID_JSON: 400,
    Code.INVALID_REQUEST: 400,
    Code.MISSING_TOKEN: 401,
    Code.INVALID_TOKEN: 401,
    Code.INSUFFICIENT_SCOPE: 403,
    Code.NOT_FOUND: 404,
    Code.INSTANCE_NOT_FOUND: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.REQUEST_TIMEOUT: 408,
    Code.INSTANCE_ID_REUSED: 409,
    Code.NO_CAPACITY: 409,
    Code.PAYLOAD_TOO_LARGE: 413,
    Code.NOT_OFFERED: 422,
    Code.RATE_LIMITED: 429,
    Code.INTERNAL: 500,
    Code.TOO_SLOW: 503,
    Code.HYPERVISOR_UNAVAILABLE: 503,
    Code.AUTH_UNAVAILABLE: 503,
    Code.RECORD_UNAVAILABLE: 503,
}
"""Codes that can reach an API caller, and the status they travel under: a 4xx is final, but for 429."""

_OPERATOR_STATUS: dict[Code, int] = {Code.GPU_NOT_FOUND: 404}
"""Codes that only the operator's socket answers with."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with one place of an input.

    Attributes:
        where: The place, as a path a person can find: ``offers[0].gpu_type``.
        what: What is wrong there.
        hint: What to do about it; empty when ``what`` says it all.
    """

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.where}: {self.what}{hint}"


class GpudError(Exception):
    """An expected failure, told in words for the person who has to act on it.

    Attributes:
        code: Stable identifier of the kind of failure.
        detail: One sentence: what happened, to which instance, GPU, file or key. Never a secret.
        hint: What to do next; may be empty.
        problems: For bad input, each fault with its place.
        retry_after_s: Set when the same request may succeed after that many seconds.
        transient: True when repeating the same act later may succeed by itself.
    """

    def __init__(
        self,
        code: Code,
        detail: str,
        *,
        hint: str = "",
        problems: Sequence[Problem] = (),
        retry_after_s: int | None = None,
        transient: bool = False,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.hint = hint
        self.problems = tuple(problems)
        self.retry_after_s = retry_after_s
        self.transient = transient or retry_after_s is not None

    @property
    def http_status(self) -> int:
        """Status under which an API caller sees this; 500 for codes that are not for callers."""
        return HTTP_STATUS.get(self.code, _OPERATOR_STATUS.get(self.code, 500))

    def __str__(self) -> str:
        lines = [self.detail + (f" ({self.hint})" if self.hint else "")]
        lines += [f"  {problem}" for problem in self.problems]
        return "\n".join(lines)
