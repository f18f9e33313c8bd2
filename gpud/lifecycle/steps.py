"""The steps of an order's life. Each is short, may be run any number of times, and records nothing
itself: what it returns is committed by the worker.

    lease_address → clone_disk → write_seed → check_gpus → bind_gpus → start_domain → await_ready
    → running
    stop_domain → remove_files → return_address → clean_gpus → return_gpus → ended
"""  # noqa: D205 - the sentence runs on

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal

from gpud.config import Config
from gpud.guest import cloudinit, disk
from gpud.guest.disk import InstanceFiles
from gpud.guest.image import ImageStore
from gpud.guest.seed import write_seed
from gpud.hypervisor.domains import Domain
from gpud.hypervisor.domainxml import DomainSpec, LibvirtNetwork, UserNetwork, render
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.hypervisor.networkxml import Lease, NetworkSpec
from gpud.lifecycle.cards import REBOOTED, CardSteps, start_time_limit_s, unplugged
from gpud.lifecycle.guests import GuestWatch
from gpud.lifecycle.outcome import Fail, Hop, Nap, Outcome, StepFunction
from gpud.model import DOMAIN_PREFIX, UPSTREAM_ID, Instance, Status, Step
from gpud.store import Store
from gpud.telemetry import Metrics

_READY_NAP_S = 10.0
_RUNNING_NAP_S = 30.0
_QUICK_END_S = 3600.0


class Steps:
    """The functions the worker runs, with what they act on."""

    def __init__(
        self,
        config: Config,
        store: Store,
        images: ImageStore,
        hypervisor: Hypervisor,
        guests: GuestWatch,
        cards: CardSteps,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._store = store
        self._images = images
        self._hypervisor = hypervisor
        self._guests = guests
        self._cards = cards
        self._metrics = metrics
        self._clock = clock

    def functions(self) -> Mapping[Step, StepFunction]:
        """Every step but the last, by its own name."""
        own = {step: getattr(self, step.value, None) for step in Step if step is not Step.ENDED}
        return {step: act or getattr(self._cards, step.value) for step, act in own.items()}

    async def lease_address(self, instance: Instance) -> Outcome:
        """Pin the instance's address to its MAC in the libvirt network."""
        address = instance.grant.address
        if address is not None:
            network = network_spec(self._config)
            await self._hypervisor.ensure_network(network)
            name = lease_name(instance.upstream_id, self._store.owner)
            await self._hypervisor.add_lease(network.name, instance.mac, address, name)
        return Hop(Step.CLONE_DISK)

    async def clone_disk(self, instance: Instance) -> Outcome:
        """Make the root disk: an overlay over the image the order was granted."""
        image = self._images.resolve(instance.grant.image_digest)
        await disk.clone(self._files(instance), image, instance.grant.shape.storage_gib)
        return Hop(Step.WRITE_SEED)

    async def write_seed(self, instance: Instance) -> Outcome:
        """Write the cloud-init seed with the caller's keys, container and script."""
        given = await self._store.guest_input(instance.upstream_id)
        texts = cloudinit.render(cloudinit.GuestSpec.of(instance, given, self._config))
        await write_seed(self._files(instance).seed, texts)
        return Hop(Step.CHECK_GPUS)

    async def start_domain(self, instance: Instance) -> Outcome:
        """Start the virtual machine."""
        if lost := await self._cards.lost(instance, fresh=True):
            return lost
        if self._cards.rebooted_since_check(instance):
            return Hop(Step.CHECK_GPUS, REBOOTED)
        spec = await self._domain_spec(instance)
        limit_s = start_time_limit_s(self._config.libvirt.call_timeout_s, instance.grant)
        await self._hypervisor.start(instance.domain_uuid, render(spec), limit_s)
        changes = {"last_start_at": self._clock(), "boots_at_start": instance.guest_boots}
        return Hop(Step.AWAIT_READY, changes=changes)

    async def await_ready(self, instance: Instance) -> Outcome:
        """Wait until the guest reports that the startup script was started."""
        self._guests.attach(instance)
        if instance.guest_boots > instance.boots_at_start:
            return self._now_running(instance)
        there = await self._there(instance)
        if lost := await self._cards.lost(instance, fresh=there is None):
            return lost
        if there is None:
            return self._start_again(instance)
        return Nap(_READY_NAP_S, self._guests.unheard(instance.upstream_id))

    async def running(self, instance: Instance) -> Outcome:
        """See that the guest is still there; a guest that ended by itself is started again."""
        self._guests.attach(instance)
        there = await self._there(instance)
        # A guest may have ended because its card was pulled out a moment ago.
        if lost := await self._cards.lost(instance, fresh=there is None):
            return lost
        if there:
            return unplugged(instance, there) or Nap(_RUNNING_NAP_S)
        powered_off = self._guests.powered_off(instance)
        if powered_off and self._config.guest.on_poweroff == "terminate":
            changes = {"status": Status.STOPPING}
            return Hop(Step.STOP_DOMAIN, "the guest powered itself off", changes)
        return self._start_again(instance)

    async def stop_domain(self, instance: Instance) -> Outcome:
        """Stop the virtual machine; its disk goes next, so there is nothing to shut down cleanly."""
        await self._guests.detach(instance.upstream_id)
        await self._hypervisor.stop(instance.domain_uuid)
        return Hop(Step.REMOVE_FILES)

    async def remove_files(self, instance: Instance) -> Outcome:
        """Remove the disk, the seed and the firmware's variables."""
        await disk.remove(self._files(instance))
        return Hop(Step.RETURN_ADDRESS)

    async def return_address(self, instance: Instance) -> Outcome:
        """Take the address out of the libvirt network."""
        if instance.grant.address is not None:
            await self._hypervisor.remove_lease(network_spec(self._config).name, instance.mac)
        return Hop(Step.CLEAN_GPUS)

    async def clean_gpus(self, instance: Instance) -> Outcome:
        """Reset what the guest had, and see that it is alive and the same."""
        # libvirt may have come through with a start whose daemon died, behind the stop.
        await self._hypervisor.stop(instance.domain_uuid)
        return await self._cards.clean_gpus(instance)

    async def _there(self, instance: Instance) -> Domain | None:
        """Its domain, if only paused: then it has its memory, and is not replaced."""
        domain = await self._hypervisor.find(instance.domain_uuid)
        if domain is not None:
            await self._guests.see(domain, instance)
        return domain

    def _now_running(self, instance: Instance) -> Outcome:
        if instance.running_at is not None:
            return Hop(Step.RUNNING, "the guest is up again")
        now = self._clock()
        self._metrics.order_to_running_seconds.labels(instance.grant.shape.gpu_type).observe(
            max(0.0, now - instance.created_at)
        )
        return Hop(Step.RUNNING, changes={"status": Status.RUNNING, "running_at": now})

    def _start_again(self, instance: Instance) -> Outcome:
        started = instance.last_start_at or 0.0
        quick = self._clock() - started < _QUICK_END_S
        restarts = instance.restarts + 1 if quick else 1
        if restarts > self._config.guest.max_restarts:
            return Fail(f"its guest ended by itself {restarts} times in a row")
        self._metrics.guest_restarts.inc()
        return Hop(Step.CHECK_GPUS, "the guest had ended by itself", {"restarts": restarts})

    async def _domain_type(self) -> Literal["kvm", "qemu"]:
        configured = self._config.libvirt.domain_type
        return await self._hypervisor.kind() if configured == "auto" else configured

    def _files(self, instance: Instance) -> InstanceFiles:
        return InstanceFiles.of(self._config.state_dir, instance.upstream_id)

    async def _domain_spec(self, instance: Instance) -> DomainSpec:
        files, shape = self._files(instance), instance.grant.shape
        network = self._config.network
        spec = DomainSpec(
            name=instance.domain_name,
            uuid=instance.domain_uuid,
            owner=self._store.owner,
            upstream_id=instance.upstream_id,
            mac=instance.mac,
            memory_mib=shape.memory_mib,
            cpu_cores=shape.cpu_cores,
            domain_type=await self._domain_type(),
            firmware=self._config.guest.firmware,
            base=files.base,
            disk=files.disk,
            seed=files.seed,
            nvram=files.nvram,
            stand_ins=sum(gpu.stand_in for gpu in instance.grant.gpus),
            network=UserNetwork() if network.mode == "user" else LibvirtNetwork(network.name),
        )
        return await self._cards.placed(spec, instance)


def lease_name(upstream_id: str, owner: str) -> str:
    """Name of an instance's entry in the libvirt network, which other gpuds may share."""
    return f"{DOMAIN_PREFIX}{upstream_id}-{owner}"


def lease_holder(lease: Lease, owner: str) -> str | None:
    """The instance that a lease was made for by the gpud ``owner``; None for anybody else's."""
    found = UPSTREAM_ID.search(lease.name)
    if found is None or lease.name != lease_name(found[0], owner):
        return None
    return found[0]


def network_spec(config: Config) -> NetworkSpec:
    """The libvirt network that the config describes."""
    network = config.network
    return NetworkSpec(name=network.name, bridge=network.name, subnet=network.subnet)
