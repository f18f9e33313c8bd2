"""Remembers tokens that were found good, so that a caller who polls costs no signature check."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Container
from typing import NamedTuple

from gpud.api.auth_claims import Caller
from gpud.api.keys import VerificationKey


class Verdict(NamedTuple):
    """A token found good.

    Attributes:
        caller: For whom it speaks.
        key: The key that signed it; None when no key of ours was involved.
        remember_s: How long this may be relied on, at most; infinite when only the token's own
            end counts.
    """

    caller: Caller
    key: VerificationKey | None = None
    remember_s: float = math.inf


class _Entry(NamedTuple):
    caller: Caller
    valid_until: float
    forget_at: float
    key: VerificationKey | None


class TokenMemory:
    """A bounded memory of good tokens, the longest unused forgotten first.

    Tokens are known by their SHA-256, so that a memory dump holds none that could be replayed.
    """

    def __init__(
        self,
        size: int,
        leeway_s: float,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._size = size
        self._leeway_s = leeway_s
        self._clock = clock
        self._monotonic = monotonic
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def recall(self, token: str) -> Caller | None:
        """Return for whom ``token`` speaks, if it was found good and still is."""
        if not self._entries:
            return None
        digest = _digest(token)
        entry = self._entries.get(digest)
        if entry is None:
            return None
        if self._clock() >= entry.valid_until or self._monotonic() >= entry.forget_at:
            del self._entries[digest]
            return None
        self._entries.move_to_end(digest)
        return entry.caller

    def keep(self, token: str, verdict: Verdict) -> None:
        """Remember that ``token`` was found good just now."""
        if self._size == 0:
            return
        expires_at = verdict.caller.expires_at
        digest = _digest(token)
        self._entries[digest] = _Entry(
            caller=verdict.caller,
            valid_until=math.inf if expires_at is None else expires_at + self._leeway_s,
            forget_at=self._monotonic() + verdict.remember_s,
            key=verdict.key,
        )
        self._entries.move_to_end(digest)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def forget_keys_except(self, keys: Container[VerificationKey]) -> None:
        """Forget every token that was signed by a key not among ``keys``."""
        gone = [digest for digest, entry in self._entries.items() if entry.key not in keys]
        for digest in gone:
            del self._entries[digest]


def _digest(token: str) -> bytes:
    # aiohttp hands over bytes that are not UTF-8 as lone surrogates.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
