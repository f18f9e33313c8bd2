"""Whether the API is reached by the name under which GPU.ai calls it."""

from __future__ import annotations

from typing import Final

import aiohttp

from gpud.api.auth_fetch import TRANSPORT_ERRORS, reason_of, shown
from gpud.config import Server
from gpud.doctor.check import Check, Group, Verdict

_REACH: Final = Check(Group.NETWORK, "base URL")
_MOST_S: Final = 5.0
_OURS: Final = b"openapi: "


async def reach(server: Server, *, daemon_up: bool, limit_s: float = _MOST_S) -> list[Verdict]:
    """Ask for the API's document, which anybody gets; nothing is said where no URL is given.

    The way goes through its name, its certificate and the proxy before it, but begins on this server.

    Args:
        server: The listener, with the URL.
        daemon_up: A daemon is there to answer.
        limit_s: How long to wait, in seconds.
    """
    if server.public_url is None:
        return []
    url = f"{server.public_url.rstrip('/')}/openapi.yaml"
    if not daemon_up:
        return [_REACH.note(f"{shown(url)} was not asked for: no daemon is here to answer")]
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=limit_s)) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            begun = await answer.content.read(len(_OURS))
    except TRANSPORT_ERRORS as error:
        return [
            _REACH.fault(
                f"{shown(url)}: {reason_of(error)}",
                f"its name, certificate, firewall and proxy; curl -sS {shown(url)}, from elsewhere too",
            )
        ]
    if begun != _OURS:
        return [
            _REACH.fault(
                f"{shown(url)} answers {answer.status}, and not with gpud's document",
                "server.public_url; or what the proxy there does with it",
            )
        ]
    return [_REACH.ok(f"{shown(server.public_url)} leads here, from this server at least")]
