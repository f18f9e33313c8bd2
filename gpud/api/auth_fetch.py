"""What the two clients of the token's issuer share: a bounded read of its answer."""

from __future__ import annotations

from typing import Final

import aiohttp
from yarl import URL

_CHUNK_BYTES: Final = 65536

TRANSPORT_ERRORS: Final = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""What aiohttp raises when an answer cannot be had, or is not HTTP."""


class FetchError(Exception):
    """The answer came, but is not one to work with; the text says why."""


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
