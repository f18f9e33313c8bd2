"""Puts the daemon together and runs it: the only module that knows every other."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from uuid import UUID

import aiohttp
import structlog

from gpud import __version__, listeners, systemd
from gpud.api.admin import Admin
from gpud.api.gate import Gate
from gpud.api.routes import Routes
from gpud.api.web import build_app
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
from gpud.reload import InForce, Parts, Reload
from gpud.statefile import Claim
from gpud.store import Store
from gpud.telemetry import Metrics
from gpud.watch.health import Health
from gpud.watch.overview import Overview
from gpud.watch.page import Page
from gpud.watch.sources import Sources
from gpud.watch.watchdog import Watchdog

_log = structlog.get_logger()

_FOLLOW_DOMAINS_S = 15.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(config: Config, reread: Callable[[], Config], claim: Claim) -> None:
    """Run the daemon until SIGTERM or SIGINT. Guests keep running after it.

    Args:
        config: What it begins with.
        reread: Reads the configuration again, at SIGHUP or when the operator asks.
        claim: Its state directory.

    Raises:
        GpudError: It cannot start; the message says why.
    """
    stop, hang_up = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, hang_up.set)
    async with running(config, reread, claim) as reload, _background(_reload_at(hang_up, reload)):
        _log.info("ready", version=__version__, port=config.server.port)
        systemd.notify(f"READY=1\nSTATUS=serving on port {config.server.port}")
        await stop.wait()
        _log.info("stopping; guests keep running")
        systemd.notify("STOPPING=1")


@asynccontextmanager
async def running(
    config: Config, reread: Callable[[], Config], claim: Claim
) -> AsyncIterator[Reload]:
    """The daemon, up, with what has it go by another configuration.

    Raises:
        GpudError: It cannot start.
        Exception: Something in the background ended that must not.
    """
    async with AsyncExitStack() as stack:
        store = await Store.on(claim)
        stack.push_async_callback(store.close)
        _make_directories(config.state_dir)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        in_force = await InForce.start(config, session)
        stack.push_async_callback(in_force.close)

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
        await _look_first(inventory)
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
        gate = Gate(config.server, in_force.authenticator, metrics)
        sources = Sources(store, inventory, images, hypervisor, desk, gate)
        health = Health(sources)
        watchdog = Watchdog(health, hypervisor, config.libvirt.threads)
        page = Page(config, metrics, sources, lambda: in_force.certificate_expires_at)
        if config.metrics.enabled:
            await listeners.metrics(stack, config.metrics, page.render, health.alive, health.ready)
        store.subscribe(partial(_forget_console, consoles))
        _pass_on_news(hypervisor, guests, worker, store)

        await stack.enter_async_context(
            _background(
                page.add_up(),  # first, so that nothing ends before it has begun
                hypervisor.run(),
                inventory.run(),
                reconciler.run(),
                store.keep_short(config.history.events_days),
                _follow_domains(hypervisor, domains),
                watchdog.run(systemd.watchdog_s()),
            )
        )
        stack.push_async_callback(guests.close)
        worker.start()
        stack.push_async_callback(worker.close)

        app = build_app(gate, Routes(desk, store, config.network, metrics, gate.in_time))
        crowd = await listeners.api(stack, config.server, in_force.tls, app)
        parts = Parts(desk, inventory, gate, crowd, page)
        reload = Reload(in_force, reread, session, parts)
        stack.push_async_callback(reload.close)
        await stack.enter_async_context(_background(reload.follow_certificate()))
        overview = Overview(config.deadlines, sources, consoles)
        admin = Admin(
            store,
            desk,
            inventory,
            cleaner.release,
            consoles,
            reconcile=partial(reconciler.once, repair=True),
            reload=reload.reload,
            overview=overview.server,
            in_full=overview.instance,
        )
        await listeners.admin(stack, config.admin_socket_path, admin.build_app())
        yield reload


async def _reload_at(hang_up: asyncio.Event, reload: Reload) -> None:
    """Reload at each SIGHUP; several during one reload are one more."""
    while True:
        await hang_up.wait()
        hang_up.clear()
        with suppress(GpudError):  # told in the log
            await reload.reload()


async def _look_first(inventory: Inventory) -> None:
    try:
        await inventory.refresh()
    except (GpudError, OSError) as error:
        _log.error("the host cannot be read; nothing is sold until it can", error=str(error))


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


def _pass_on_news(hypervisor: Hypervisor, guests: GuestWatch, worker: Worker, store: Store) -> None:
    hypervisor.subscribe(guests.hear)
    hypervisor.subscribe(lambda uuid, *_: _wake(worker, store, uuid))
    hypervisor.on_connect(worker.wake_all)


def _wake(worker: Worker, store: Store, domain_uuid: UUID) -> None:
    for instance in store.live.values():
        if instance.domain_uuid == domain_uuid:
            worker.wake(instance.upstream_id)


def _forget_console(consoles: ConsoleLogs, instance: Instance) -> None:
    if instance.status is Status.TERMINATED:
        consoles.remove(instance.upstream_id)


def _make_directories(state_dir: Path) -> None:
    for name, mode in (("images", 0o755), ("instances", 0o711), ("console", 0o700)):
        _directory(state_dir / name, mode)


def _directory(path: Path, mode: int) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)  # not left to the umask: QEMU's user must pass through
    except OSError as error:
        raise GpudError(
            Code.STATE_UNUSABLE, f"{path} cannot be made: {error.strerror}", hint="see state_dir"
        ) from error
