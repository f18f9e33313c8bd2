"""The bodies of the Supplier API: an order is read and judged here, an instance is written out.

The contract's choices on what a field may hold are made here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gpud.errors import Code, GpudError, Problem
from gpud.model import UPSTREAM_ID, GuestInput, Instance, Order, Status, Tier
from gpud.offers import as_number

INSTANCE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+~-]{0,127}")
"""What an ``instance_id`` may be: anything that stands unescaped in a URL's path and a log line."""

# The grammar of the Distribution project's reference package: [host[:port]/]path[:tag][@digest].
_PATH_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST_PART = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = rf"(?:{_HOST_PART}(?:\.{_HOST_PART})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?"
IMAGE_REFERENCE = re.compile(
    rf"(?:{_HOST}/)?{_PATH_PART}(?:/{_PATH_PART})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
    r"(?:@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?"
)

_MAX_KEYS = 100
_MAX_KEY_CHARACTERS = 16384
_MAX_IMAGE_CHARACTERS = 512


def _instance_id(value: str) -> str:
    if INSTANCE_ID.fullmatch(value) is None:
        raise ValueError("must be 1 to 128 letters, digits or . _ : @ = + ~ -, and begin with "
                         "a letter or digit")  # fmt: skip
    if UPSTREAM_ID.fullmatch(value) is not None:
        raise ValueError("has the form of this server's own ids")
    return value


def _ssh_public_key(value: str) -> str:
    key = value.strip()
    if not key.isprintable():
        raise ValueError("must be one line of printable text")
    try:
        load_ssh_public_key(key.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("is not an OpenSSH public key (type, base64, comment)") from None
    return key


def _image_reference(value: str) -> str:
    if len(value) > _MAX_IMAGE_CHARACTERS or IMAGE_REFERENCE.fullmatch(value) is None:
        raise ValueError("is not an image reference such as registry.example.com/team/image:tag")
    return value


def _script(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


class OrderBody(BaseModel):
    """The body of ``POST /v1/instances``. Unknown fields are ignored: GPU.ai may add some."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    instance_id: Annotated[str, AfterValidator(_instance_id)]
    gpu_type: Annotated[str, Field(max_length=128)]
    gpu_count: int
    tier: Annotated[str, Field(max_length=128)]
    region: Annotated[str, Field(max_length=128)] | None = None
    ssh_public_keys: Annotated[
        list[
            Annotated[str, Field(max_length=_MAX_KEY_CHARACTERS), AfterValidator(_ssh_public_key)]
        ],
        Field(max_length=_MAX_KEYS),
    ] = Field(default=[], repr=False)
    docker_image: Annotated[str, AfterValidator(_image_reference)] | None = None
    startup_script: Annotated[str, AfterValidator(_script)] | None = Field(default=None, repr=False)

    @property
    def unknown_fields(self) -> int:
        """How many fields were given that gpud does not know."""
        return len(self.model_extra or {})


def parse_order(body: bytes) -> tuple[Order, int]:
    """Judge the body of an order.

    Returns:
        The order, and how many unknown fields were ignored.

    Raises:
        GpudError: ``INVALID_JSON``, ``INVALID_REQUEST`` with every field's fault, or ``NOT_OFFERED``
            for a tier that does not exist. The texts never quote the body.
    """
    try:
        given = OrderBody.model_validate_json(body)
        _check_unambiguous(body)
    except ValidationError as error:
        raise _refusal(error) from None
    except ValueError:
        raise GpudError(Code.INVALID_JSON, "the body is not valid JSON") from None
    if given.tier not in list(Tier):
        tiers = " or ".join(Tier)
        problem = Problem("tier", f"must be {tiers}")
        raise GpudError(Code.NOT_OFFERED, "this server does not offer that", problems=[problem])
    script = given.startup_script
    order = Order(
        instance_id=given.instance_id,
        gpu_type=given.gpu_type,
        gpu_count=given.gpu_count,
        tier=Tier(given.tier),
        region=given.region,
        guest_input=GuestInput(
            ssh_public_keys=tuple(given.ssh_public_keys),
            docker_image=given.docker_image,
            startup_script=script.encode() if script else None,
        ),
        fingerprint=_fingerprint(given),
    )
    return order, given.unknown_fields


def _check_unambiguous(body: bytes) -> None:
    """Refuse what pydantic's parser lets pass: a key given twice, NaN and the infinities.

    Raises:
        ValueError: One of them is in ``body``.
    """
    json.loads(body, object_pairs_hook=_without_repeats, parse_constant=_not_json)


def _without_repeats(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _fingerprint(given: OrderBody) -> str:
    """Hash of the fields gpud knows, so that a field GPU.ai adds later does not break a repeat."""
    fields = given.model_dump(include=set(OrderBody.model_fields))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _refusal(error: ValidationError) -> GpudError:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return GpudError(Code.INVALID_JSON, "the body is not valid JSON")
    problems = [
        Problem(_dotted(detail["loc"]), detail["msg"].removeprefix("Value error, "))
        for detail in details
    ]
    return GpudError(Code.INVALID_REQUEST, "the order is not valid", problems=problems)


def _dotted(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else str(part) for part in location]
    return "".join(parts) or "(body)"


def instance_json(instance: Instance, now: float, guest_address: str | None) -> dict[str, Any]:
    """``GET /v1/instances/{id}``.

    Args:
        instance: The instance.
        now: Seconds since the epoch.
        guest_address: The guest's IP address, while it has one.
    """
    answer: dict[str, Any] = {
        "upstream_id": instance.upstream_id,
        "status": instance.status.value,
        "cost_per_hour": as_number(instance.grant.cost_per_hour),
        "uptime_seconds": uptime_s(instance, now),
    }
    if guest_address is not None:
        answer["ip"] = guest_address
    if instance.status is Status.ERROR and instance.failure is not None:
        answer["status_message"] = instance.failure
    return answer


def uptime_s(instance: Instance, now: float) -> int:
    """Whole seconds since the instance was first running, until it ended."""
    if instance.running_at is None:
        return 0
    return max(0, int((instance.ended_at or now) - instance.running_at))
