"""What differs between two configurations, and what of it takes effect without a restart.

Everything else is asked for once, when the daemon starts: where things lie, what is listened on, how
guests are made. It could only be changed half.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from gpud.config.whole import Config

RELOADED: Final = frozenset(
    {
        "server.public_url",
        "server.tls",
        "server.trusted_proxies",
        "server.proxy_header",
        "server.max_connections_per_address",
        "server.max_body_bytes",
        "server.header_timeout_s",
        "server.body_timeout_s",
        "server.request_timeout_s",
        "server.limits",
        "auth",
        "site",
        "offers",
        "price_per_hour_is",
        "stock",
        "host_reserve",
        "guest.image",
        "guest.estimated_ready_s",
        "log",
    }
)
"""The keys that take effect by a reload, each with all that is in it."""

_UNTOLD: Final = "auth"
"""Its values are nobody's business: a URL may have a password in it."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key that has another value than before.

    Attributes:
        key: With its place: ``offers[0].price_per_gpu_hour.spot``.
        before: Its value as text; "none" where it was not given.
        after: Likewise.
    """

    key: str
    before: str
    after: str

    @property
    def reloaded(self) -> bool:
        """Whether it takes effect without a restart."""
        path = re.sub(r"\[\d+\]", "", self.key).split(".")
        return any(".".join(path[:length]) in RELOADED for length in range(1, len(path) + 1))

    def __str__(self) -> str:
        if self.key.split(".")[0] == _UNTOLD:
            return self.key
        return f"{self.key}: {self.before} -> {self.after}"


def changes(before: Config, after: Config) -> list[Change]:
    """Every key whose value differs, in the file's order."""
    old, new = _leaves(before), _leaves(after)
    keys = dict.fromkeys([*new, *old])
    found = ((key, old.get(key, "none"), new.get(key, "none")) for key in keys)
    return [Change(*one) for one in found if one[1] != one[2]]


def _leaves(config: Config) -> dict[str, str]:
    return dict(_walk("", config.model_dump(mode="json")))


def _walk(key: str, value: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - any JSON
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _walk(f"{key}.{name}" if key else name, part)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _walk(f"{key}[{number}]", part)
    else:
        yield key, "none" if value is None else str(value)
