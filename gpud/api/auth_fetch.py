"""What the clients of the token's issuer share: a bounded answer, and one question for all who ask."""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

import aiohttp
from yarl import URL

T = TypeVar("T")

_CHUNK_BYTES: Final = 65536

TRANSPORT_ERRORS: Final = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""What aiohttp raises when an answer cannot be had, or is not HTTP."""


class FetchError(Exception):
    """The answer came, but is not one to work with; the text says why."""


async def joined(flight: asyncio.Task[T]) -> T | None:
    """What comes of a question that others wait for too: who goes away does not end it for them.

    None where it was ended itself, as its client's ``close`` does: a reload may have put another in its
    place, which is no reason to end who waits.
    """
    await asyncio.wait([flight])
    return None if flight.cancelled() else flight.result()


async def read_body(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """Read the whole body.

    Raises:
        FetchError: It is larger than ``limit_bytes``.
    """
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        body += chunk
        if len(body) > limit_bytes:
            raise FetchError(f"the answer is larger than {limit_bytes} bytes")
    return bytes(body)


def reason_of(error: Exception) -> str:
    """Words for a failed fetch; some of aiohttp's and asyncio's errors have none of their own."""
    return str(error) or type(error).__name__


def shown(url: str) -> str:
    """``url`` as it may be logged: without user, password and query."""
    return str(URL(url).with_user(None).with_query(None).with_fragment(None))
