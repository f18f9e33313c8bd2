"""Asks the running daemon over its Unix socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import aiohttp

from gpud.errors import Code, GpudError, Problem

_POLL_S = 1.0
_ANSWER_S = 60.0
"""Questions are answered from memory or the record. What changes something may take longer."""


class Target(Protocol):
    """Where an answer of any length goes, such as a file."""

    def write(self, text: bytes, /) -> object:
        """Take the next part."""

    def flush(self) -> None:
        """Pass on what was taken."""


def get(socket: Path, path: str) -> Any:  # noqa: ANN401 - whatever JSON the daemon answers
    """Fetch one JSON answer.

    Raises:
        GpudError: The daemon does not answer, or refuses.
    """
    return asyncio.run(_get(socket, path))


def post(socket: Path, path: str, body: dict[str, str] | None = None) -> Any:  # noqa: ANN401
    """Ask for a change; returns the JSON answer.

    Raises:
        GpudError: The daemon does not answer, or refuses.
    """
    return asyncio.run(_post(socket, path, body or {}))


def copy(socket: Path, path: str, target: Target) -> None:
    """Copy an answer of any length to ``target`` as it comes.

    Raises:
        GpudError: The daemon does not answer, or refuses.
    """
    asyncio.run(_copy(socket, path, target))


def follow_events(
    socket: Path, wanted: Mapping[str, str], after: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Every event after the one with the id ``after``, as it comes, for ever.

    Args:
        socket: Where the daemon listens.
        wanted: Which events, as the query of ``/events`` has it.
        after: The id of the last event that is known.
        say: Is told when the daemon goes away and comes back, over which events are not lost.

    Raises:
        GpudError: The daemon refuses.
    """
    away = False
    while True:
        time.sleep(_POLL_S)
        try:
            if away:  # it may have come back with an older record, from a backup
                newest = get(socket, events_path({"limit": "1"}))["events"]
                after = min(after, newest[-1]["id"] if newest else 0)
            found = get(socket, events_path({**wanted, "after": str(after)}))["events"]
        except GpudError as error:
            if error.code is not Code.STATE_UNUSABLE:
                raise
            if not away:
                say("the daemon does not answer; waiting for it")
            away = True
            continue
        if away:
            say("the daemon answers again")
        away = False
        yield from found
        after = found[-1]["id"] if found else after


def events_path(wanted: Mapping[str, str]) -> str:
    """The path of events."""
    return f"/events?{urlencode(wanted)}"


def instance_path(instance_id: str, act: str = "") -> str:
    """The path of an instance, or of an act on it."""
    return f"/instances/{quote(instance_id, safe='')}" + (f"/{act}" if act else "")


def console_path(instance_id: str, *, follow: bool) -> str:
    """The path of an instance's console."""
    return instance_path(instance_id, "console") + ("?follow=1" if follow else "")


def gpu_path(address: str, act: str) -> str:
    """The path of an act on a GPU."""
    return f"/gpus/{quote(address, safe='')}/{act}"


async def _get(socket: Path, path: str) -> Any:  # noqa: ANN401
    async with _asked(socket, "GET", path, answer_s=_ANSWER_S) as response:
        return await response.json()


async def _post(socket: Path, path: str, body: dict[str, str]) -> Any:  # noqa: ANN401
    async with _asked(socket, "POST", path, body) as response:
        return await response.json()


async def _copy(socket: Path, path: str, target: Target) -> None:
    async with _asked(socket, "GET", path) as response:
        async for chunk in response.content.iter_any():
            target.write(chunk)
            target.flush()


@asynccontextmanager
async def _asked(
    socket: Path,
    method: str,
    path: str,
    body: dict[str, str] | None = None,
    answer_s: float | None = None,
) -> AsyncIterator[aiohttp.ClientResponse]:
    connector = aiohttp.UnixConnector(str(socket))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=answer_s)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.request(method, f"http://gpud{path}", json=body) as response,
        ):
            if response.status != 200:  # noqa: PLR2004
                raise await _refusal(response)
            yield response
    except aiohttp.ClientConnectorError as error:
        denied = isinstance(error.os_error, PermissionError)
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"no daemon answers on {socket}: {error.os_error.strerror}",
            hint="ask as root, or as a member of the daemon's group"
            if denied
            else "`systemctl status gpud` tells whether it runs",
        ) from error
    except aiohttp.ServerTimeoutError as error:
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"the daemon on {socket} does not answer in time",
            hint="`journalctl -u gpud` tells what it does; `systemctl restart gpud` ends no guest",
        ) from error
    except aiohttp.ClientError as error:
        raise GpudError(Code.STATE_UNUSABLE, "the daemon broke off its answer") from error


async def _refusal(response: aiohttp.ClientResponse) -> GpudError:
    try:
        body = await response.json(content_type=None)
        code, detail, hint = Code(body["code"]), body["detail"], body["hint"]
        problems = [Problem(p["field"], p["detail"], p["hint"]) for p in body.get("errors", ())]
        return GpudError(code, detail, hint=hint, problems=problems)
    except (ValueError, KeyError, TypeError):
        return GpudError(Code.INTERNAL, f"the daemon answered {response.status}; see its log")
