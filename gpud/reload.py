"""The configuration in force, and another one in its place while the daemon runs.

Whatever can fail is done first and beside the daemon: the file is judged, the certificate loaded, the
token keys fetched. Only then everything that goes by the configuration is given the new one, in one go
without a wait, so that no request ever meets half of it. What an order was granted is in the record and
stays.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import aiohttp
import structlog

from gpud import systemd
from gpud.api.auth import Authenticator
from gpud.api.gate import Gate
from gpud.api.tls import Certificate, file_stamps
from gpud.config import Auth, Change, Config, Tls, changes
from gpud.crowd import Crowd
from gpud.desk import OrderDesk
from gpud.errors import Code, GpudError, Problem
from gpud.inventory import Inventory
from gpud.telemetry import set_up_logging
from gpud.watch.page import Page

_log = structlog.get_logger()

_LOOK_AT_CERTIFICATE_EVERY_S: Final = 60.0


@dataclass(slots=True)
class InForce:
    """The configuration that the daemon goes by, and what was made from it.

    Attributes:
        config: The configuration.
        authenticator: Judges tokens by it; started.
        certificate: What callers are shown; None without TLS.
    """

    config: Config
    authenticator: Authenticator
    certificate: Certificate | None

    @classmethod
    async def start(cls, config: Config, session: aiohttp.ClientSession) -> InForce:
        """Begin with ``config``. ``session`` fetches token keys, and stays its owner's to close.

        Raises:
            GpudError: ``CONFIG_INVALID``: a file that it names is not usable.
        """
        certificate = await _certificate(config.server.tls)
        authenticator = Authenticator(config.auth, session)
        await authenticator.start()
        return cls(config, authenticator, certificate)

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For new connections; None for plain HTTP."""
        return self.certificate.context if self.certificate is not None else None

    @property
    def certificate_expires_at(self) -> float | None:
        """Seconds since the epoch; None without TLS."""
        return self.certificate.expires_at if self.certificate is not None else None

    async def close(self) -> None:
        """Stop the background work."""
        await self.authenticator.close()


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that goes by what can be reloaded."""

    desk: OrderDesk
    inventory: Inventory
    gate: Gate
    crowd: Crowd
    page: Page


class Reload:
    """Reads the configuration again and has the daemon go by it, whole or not at all.

    Args:
        in_force: Is brought up to date.
        read: Reads the file.
        session: For the token keys; stays its owner's to close.
        parts: Are told of it.
    """

    def __init__(
        self,
        in_force: InForce,
        read: Callable[[], Config],
        session: aiohttp.ClientSession,
        parts: Parts,
    ) -> None:
        self._in_force = in_force
        self._read = read
        self._session = session
        self._parts = parts
        self._one_at_a_time = asyncio.Lock()
        self._under_way: set[asyncio.Task[list[str]]] = set()
        self._useless: object = None

    async def reload(self) -> list[str]:
        """Read the file again. Goes on to its end even when who asked does not wait for it.

        Returns:
            What has changed, one sentence each.

        Raises:
            GpudError: ``CONFIG_INVALID`` with every problem; everything is as it was before.
        """
        task = asyncio.create_task(self._in_turn())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End what is under way."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def follow_certificate(self) -> None:
        """Take up certificate files that were renewed, for as long as the daemon lives."""
        while True:
            await asyncio.sleep(_LOOK_AT_CERTIFICATE_EVERY_S)
            await self.renew_certificate()

    async def renew_certificate(self) -> None:
        """Show callers the certificate that is in the files now, if it is another and is good.

        Who renews writes one file after the other. A pair that does not fit is told in the log, and
        looked at again once a file changes.
        """
        async with self._one_at_a_time:
            shown = self._in_force.certificate
            if shown is None:
                return
            stamps = await asyncio.to_thread(file_stamps, shown.files)
            if stamps in (shown.stamps, self._useless):
                return
            try:
                certificate = await asyncio.to_thread(Certificate.read, shown.files)
            except GpudError as error:
                self._useless = stamps
                _log.error("the renewed certificate cannot be used", error=str(error))
                return
            self._in_force.certificate = certificate
            self._parts.crowd.reconfigure(self._in_force.config.server, certificate.context)
            _log.info("certificate renewed", valid_until=_date(certificate))

    async def _in_turn(self) -> list[str]:
        async with self._one_at_a_time:
            systemd.notify(systemd.reloading())
            try:
                told = await self._reload()
            except GpudError as error:
                _log.error(
                    "the new configuration is refused, nothing was changed", error=str(error)
                )
                raise
            except Exception as error:  # a defect must not end what runs well
                _log.error("the reload failed unexpectedly, nothing was changed", exc_info=error)
                raise GpudError(
                    Code.INTERNAL, "the reload failed unexpectedly; see the log"
                ) from error
            finally:
                systemd.notify("READY=1")
        _log.warning("configuration reloaded", changed=told)
        return told

    async def _reload(self) -> list[str]:
        config = await asyncio.to_thread(self._read)
        found = changes(self._in_force.config, config)
        _refuse_what_needs_a_restart(found)
        before, after = self._in_force.authenticator, await self._prepare(config)
        told = [*map(str, found), *_of_certificate(self._in_force.certificate, after.certificate)]
        self._swap(after)
        if after.authenticator is before:
            await before.reload()  # keys that cannot be fetched are told in the log
        else:
            await before.close()
        return told

    async def _prepare(self, config: Config) -> InForce:
        """Make everything that may fail, beside what is in force.

        Raises:
            GpudError: ``CONFIG_INVALID``, with what cannot be made.
        """
        problems: list[Problem] = []
        certificate: Certificate | None = None
        try:
            certificate = await _certificate(config.server.tls)
        except GpudError as error:
            problems += _problems("server.tls", error)
        try:
            authenticator = await self._authenticator(config.auth)
        except GpudError as error:
            problems += _problems("auth", error)
        else:
            if not problems:
                return InForce(config, authenticator, certificate)
            await self._drop(authenticator)
        raise GpudError(Code.CONFIG_INVALID, "the configuration cannot be used", problems=problems)

    async def _authenticator(self, auth: Auth) -> Authenticator:
        """A new one, which remembers no token; the one in force where only the JWKS may differ."""
        before = self._in_force.authenticator
        if auth.jwks_url is not None and auth == self._in_force.config.auth:
            return before
        made = Authenticator(auth, self._session)
        try:
            await made.start()
            if before.ready and not made.ready:
                raise GpudError(
                    Code.CONFIG_INVALID,
                    "auth.jwks_url: no keys could be fetched from there",
                    hint='the log says why, at "jwks unavailable"',
                )
        except BaseException:
            await made.close()
            raise
        return made

    async def _drop(self, authenticator: Authenticator) -> None:
        if authenticator is not self._in_force.authenticator:
            await authenticator.close()

    def _swap(self, new: InForce) -> None:
        """Go by it. Nothing here can fail, and nothing waits."""
        config, parts, current = new.config, self._parts, self._in_force
        if config.log != current.config.log:
            set_up_logging(config.log)
        parts.gate.reconfigure(config.server, new.authenticator)
        parts.crowd.reconfigure(config.server, new.tls)
        parts.inventory.reconfigure(config)
        parts.desk.reconfigure(config)
        parts.page.reconfigure(config)
        current.config, current.authenticator = config, new.authenticator
        current.certificate = new.certificate


async def _certificate(files: Tls | None) -> Certificate | None:
    return None if files is None else await asyncio.to_thread(Certificate.read, files)


def _refuse_what_needs_a_restart(found: list[Change]) -> None:
    fixed = [change for change in found if not change.reloaded]
    if fixed:
        raise GpudError(
            Code.CONFIG_INVALID,
            "some keys cannot be changed while gpud runs",
            hint="put them back, or `systemctl restart gpud`; guests keep running",
            problems=[
                Problem(one.key, f"is {one.before}, would be {one.after}",
                        "restart gpud to change it") for one in fixed
            ],
        )  # fmt: skip


def _problems(section: str, error: GpudError) -> list[Problem]:
    """What is wrong with the files that a section of the configuration names."""
    what = error.detail.removeprefix(f"{section}: ")
    return list(error.problems) or [Problem(section, what, error.hint)]


def _of_certificate(before: Certificate | None, after: Certificate | None) -> list[str]:
    if after is None or (before is not None and before.stamps == after.stamps):
        return []
    return [f"server.tls: another certificate, valid until {_date(after)}"]


def _date(certificate: Certificate) -> str:
    return f"{datetime.fromtimestamp(certificate.expires_at, UTC):%Y-%m-%d %H:%M} UTC"
