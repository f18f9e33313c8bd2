"""Puts the daemon together and runs it: the only module that knows every other."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from uuid import UUID

import aiohttp
import structlog

from gpud import __version__, listeners, systemd
from gpud.api.admin import Admin
from gpud.api.auth import Authenticator
from gpud.api.routes import Routes
from gpud.api.web import build_app, certificate_expires_at, tls_context
from gpud.config import Config
from gpud.desk import OrderDesk
from gpud.errors import Code, GpudError
from gpud.guest.console import ConsoleLogs
from gpud.guest.image import ImageStore
from gpud.host import capacity, livebus
from gpud.host.boot import boot_id
from gpud.host.nvml import Nvml
from gpud.host.sysfs import Sysfs
from gpud.host.vfio import Handover
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.inventory import Inventory
from gpud.lifecycle.cards import CardSteps
from gpud.lifecycle.cleaning import Cleaner
from gpud.lifecycle.guests import GuestWatch
from gpud.lifecycle.reconcile import Reconciler
from gpud.lifecycle.steps import Steps
from gpud.lifecycle.strays import StrayWatch
from gpud.lifecycle.worker import Worker
from gpud.model import Instance, PciAddress, Status
from gpud.store import Store
from gpud.telemetry import Metrics
from gpud.watch.health import Health
from gpud.watch.page import Page
from gpud.watch.sources import Sources

_log = structlog.get_logger()

_FOLLOW_DOMAINS_S = 15.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT. Guests keep running after it.

    Raises:
        GpudError: It cannot start; the message says why.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    async with running(config):
        _log.info("ready", version=__version__, port=config.server.port)
        systemd.notify(f"READY=1\nSTATUS=serving on port {config.server.port}")
        await stop.wait()
        _log.info("stopping; guests keep running")
        systemd.notify("STOPPING=1")


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[None]:
    """The daemon, up.

    Raises:
        GpudError: It cannot start.
        Exception: Something in the background ended that must not.
    """
    tls = tls_context(config.server.tls) if config.server.tls else None
    async with AsyncExitStack() as stack:
        store = await Store.open(config.state_dir)
        stack.push_async_callback(store.close)
        for name, mode in (("images", 0o755), ("instances", 0o711), ("console", 0o700)):
            _directory(config.state_dir / name, mode)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        authenticator = Authenticator(config.auth, session)
        await authenticator.start()
        stack.push_async_callback(authenticator.close)

        metrics = Metrics()
        images = ImageStore(config.state_dir / "images")
        sysfs = Sysfs()
        ask_nvml = config.gpus.nvml and not config.gpus.stand_ins
        nvml = Nvml(config.gpus.nvml_timeout_s) if ask_nvml else None
        measure = partial(
            capacity.measure, config.state_dir, hugepage_kib=config.guest.hugepage_kib
        )
        domains: dict[PciAddress, str] = {}
        handover = Handover(sysfs)
        inventory = Inventory(
            config,
            measure,
            partial(livebus.read, sysfs),
            nvml,
            store,
            domains=lambda: domains,
            handover=handover,
        )
        try:
            await inventory.refresh()
        except (GpudError, OSError) as error:
            _log.error("the host cannot be read; nothing is sold until it can", error=str(error))
        hypervisor = Hypervisor(
            config.libvirt.uri,
            call_timeout_s=config.libvirt.call_timeout_s,
            threads=config.libvirt.threads,
            metrics=metrics,
        )
        consoles = ConsoleLogs(config.state_dir / "console", config.guest.console_log_kib * 1024)
        guests = GuestWatch(hypervisor, store, consoles, metrics)
        cleaner = Cleaner(store, sysfs, handover, nvml, hypervisor, boot_id(), metrics)
        cards = CardSteps(config, store, inventory, sysfs, handover, cleaner)
        steps = Steps(config, store, images, hypervisor, guests, cards, metrics)
        worker = Worker(store, steps.functions(), config.deadlines, metrics)
        reconciler = Reconciler(
            config,
            store,
            hypervisor,
            consoles,
            metrics,
            StrayWatch(store, hypervisor, sysfs, cleaner.boot_id),
        )
        desk = OrderDesk(config, store, inventory, images, lambda: hypervisor.available, metrics)
        if config.metrics.enabled:
            sources = Sources(store, inventory, images, hypervisor, desk, authenticator)
            await _let_watch(stack, config, metrics, sources)

        store.subscribe(partial(_forget_console, consoles))
        hypervisor.subscribe(guests.hear)
        hypervisor.subscribe(lambda uuid, *_: _wake(worker, store, uuid))
        hypervisor.on_connect(worker.wake_all)

        await stack.enter_async_context(
            _background(
                hypervisor.run(),
                inventory.run(),
                reconciler.run(),
                store.keep_short(config.history.events_days),
                _follow_domains(hypervisor, domains),
            )
        )
        stack.push_async_callback(guests.close)
        worker.start()
        stack.push_async_callback(worker.close)

        repair = partial(reconciler.once, repair=True)
        admin = Admin(store, desk, inventory, cleaner.release, consoles, reconcile=repair)
        await listeners.admin(stack, config.admin_socket_path, admin.build_app())
        routes = Routes(desk, store, config.network, metrics)
        app = build_app(config.server, routes, authenticator, metrics)
        await listeners.api(stack, config.server, tls, app)
        yield


async def _let_watch(
    stack: AsyncExitStack, config: Config, metrics: Metrics, sources: Sources
) -> None:
    """Open Prometheus' listener; to be done before any instance can end."""
    tls = config.server.tls
    page = Page(config, metrics, sources, certificate_expires_at(tls) if tls else None)
    await page.start()
    health = Health(sources)
    await listeners.metrics(stack, config.metrics, page.render, health.alive, health.ready)


async def _follow_domains(hypervisor: Hypervisor, domains: dict[PciAddress, str]) -> None:
    """Keep up with which domains have which of the host's PCI functions, whoever made them."""
    while True:
        await hypervisor.wait_available()
        with suppress(GpudError):
            found = await hypervisor.passed_functions()
            domains.clear()
            domains.update(found)
        await asyncio.sleep(_FOLLOW_DOMAINS_S)


@asynccontextmanager
async def _background(*work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Tasks that live as long as the daemon; if one ends with an error, so does the daemon."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
    except ExceptionGroup as errors:
        # One error, which is the rule, is told as itself and not as a group of one.
        if len(errors.exceptions) == 1:
            raise errors.exceptions[0] from None
        raise


def _wake(worker: Worker, store: Store, domain_uuid: UUID) -> None:
    for instance in store.live.values():
        if instance.domain_uuid == domain_uuid:
            worker.wake(instance.upstream_id)


def _forget_console(consoles: ConsoleLogs, instance: Instance) -> None:
    if instance.status is Status.TERMINATED:
        consoles.remove(instance.upstream_id)


def _directory(path: Path, mode: int) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)  # not left to the umask: QEMU's user must pass through
    except OSError as error:
        raise GpudError(
            Code.STATE_UNUSABLE, f"{path} cannot be made: {error.strerror}", hint="see state_dir"
        ) from error
