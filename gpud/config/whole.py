"""The whole file.

Cross-checks here and in the sections are field validators that look back at the fields before them
(``info.data``), not whole-model validators: pydantic skips the latter once any field is wrong, and an
operator wants every fault in one go.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from gpud.config.auth import Auth
from gpud.config.guest import Deadlines, Guest
from gpud.config.listeners import Metrics, Server
from gpud.config.machine import Gpus, Libvirt, Network
from gpud.config.section import Section
from gpud.config.selling import HostReserve, Offer, Site, Stock
from gpud.configtypes import AbsolutePath


class History(Section):
    """What is remembered of the past. Instances are for ever, since they make an order's repeat safe."""

    events_days: Annotated[int, Field(ge=1, le=36500)] = 90


class Log(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


def _default_state_dir() -> Path:
    return Path(os.environ.get("STATE_DIRECTORY", "/var/lib/gpud").split(":")[0])


class Config(Section):
    """The whole file."""

    state_dir: AbsolutePath = Field(default_factory=_default_state_dir)
    admin_socket: AbsolutePath | None = None
    server: Server = Server()
    metrics: Metrics = Metrics()
    auth: Auth
    site: Site
    offers: list[Offer] = []
    price_per_hour_is: Literal["offering", "gpu"] = "offering"
    stock: Stock = Stock()
    host_reserve: HostReserve = HostReserve()
    gpus: Gpus = Gpus()
    libvirt: Libvirt = Libvirt()
    network: Network = Network()
    guest: Guest = Guest()
    deadlines: Deadlines = Deadlines()
    history: History = History()
    log: Log = Log()

    @property
    def admin_socket_path(self) -> Path:
        """Where the CLI meets the daemon: as configured, else systemd's runtime directory, else here."""
        if self.admin_socket is not None:
            return self.admin_socket
        runtime = os.environ.get("RUNTIME_DIRECTORY")
        return (Path(runtime.split(":")[0]) if runtime else self.state_dir) / "gpud.sock"

    @field_validator("metrics")
    @classmethod
    def _own_port(cls, metrics: Metrics, info: ValidationInfo) -> Metrics:
        server = info.data.get("server")
        if metrics.enabled and server is not None and metrics.port == server.port:
            raise ValueError(f"port {metrics.port} is taken by server.port")
        return metrics

    @field_validator("offers")
    @classmethod
    def _one_offer_per_type(cls, offers: list[Offer]) -> list[Offer]:
        names = [offer.gpu_type for offer in offers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is offered twice; put all counts into one offer")
        return offers

    @field_validator("guest")
    @classmethod
    def _whole_hugepages(cls, guest: Guest, info: ValidationInfo) -> Guest:
        offers: list[Offer] = info.data.get("offers") or []
        for offer in offers:
            if guest.hugepage_kib and offer.per_gpu.memory_gib * 2**20 % guest.hugepage_kib:
                raise ValueError(
                    f"hugepages of {guest.hugepages} do not add up to the"
                    f" {offer.per_gpu.memory_gib:g} GiB that each {offer.gpu_type} comes with"
                )
        return guest

    @field_validator("gpus")
    @classmethod
    def _enough_stand_ins(cls, gpus: Gpus, info: ValidationInfo) -> Gpus:
        offers: list[Any] = info.data.get("offers") or []
        sold = {offer.gpu_type for offer in offers}
        for stand_ins in gpus.stand_ins:
            if offers and stand_ins.gpu_type not in sold:
                raise ValueError(f"stand-ins of type {stand_ins.gpu_type}, which is not offered")
        return gpus
