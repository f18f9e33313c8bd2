"""The daemon's configuration as a tree of types; ``config/gpud.yaml`` documents every key.

Read through :mod:`gpud.configfile`. Cross-checks are field validators that look back at the fields
before them (``info.data``), not whole-model validators: pydantic skips the latter once any field is
wrong, and an operator wants every fault in one go.
"""

from __future__ import annotations

import os
import re
from decimal import Decimal
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from gpud.configtypes import (
    AbsolutePath,
    GpuTypeName,
    HttpsUrl,
    PciIds,
    Port,
    Seconds,
)
from gpud.model import Step, Tier

IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Section(BaseModel):
    """A mapping of the file: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tls(Section):
    """Certificate chain and key, PEM. Both or neither."""

    certificate_file: AbsolutePath
    key_file: AbsolutePath


class Server(Section):
    """The listener that GPU.ai calls, and its limits."""

    listen: str = "0.0.0.0"  # noqa: S104 - GPU.ai calls from outside
    port: Port = 8443
    tls: Tls | None = None
    max_body_bytes: Annotated[int, Field(ge=1024, le=16 * 2**20)] = 2**20
    body_timeout_s: Seconds = 15
    request_timeout_s: Seconds = 30
    keepalive_timeout_s: Seconds = 75
    shutdown_timeout_s: Seconds = 10


class Metrics(Section):
    """The Prometheus listener; loopback unless the operator says otherwise."""

    enabled: bool = True
    listen: str = "127.0.0.1"
    port: Port = 9487


class SecretSource(Section):
    """Where a secret is read from: a file, or a systemd credential. Never written in the YAML."""

    file: AbsolutePath | None = None
    credential: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] | None = None

    @field_validator("credential")
    @classmethod
    def _one_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) == (info.data.get("file") is None):
            raise ValueError("give exactly one of file and credential")
        return value

    # Without this, a section that names neither is never held against the rule above.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class Introspection(Section):
    """RFC 7662 token introspection, for tokens that are not JWTs."""

    url: HttpsUrl
    client_id: Annotated[str, Field(min_length=1)]
    client_secret: SecretSource
    remember_s: Seconds = 60


Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]


class Auth(Section):
    """How a bearer token is judged. One key source: ``jwks_url``, ``key_files`` or ``introspection``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    algorithms: Annotated[list[Algorithm], Field(min_length=1)] = ["RS256"]
    leeway_s: Annotated[float, Field(ge=0, le=300)] = 30
    client_ids: list[str] = []
    scopes: list[str] = []
    jwks_url: HttpsUrl | None = None
    key_files: list[AbsolutePath] = []
    introspection: Introspection | None = None
    jwks_refresh_s: Seconds = 600
    jwks_min_interval_s: Seconds = 30
    http_timeout_s: Seconds = 10
    remembered_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 4096

    @field_validator("introspection")
    @classmethod
    def _one_key_source(
        cls, value: Introspection | None, info: ValidationInfo
    ) -> Introspection | None:
        sources = [info.data.get("jwks_url"), info.data.get("key_files"), value]
        if sum(bool(source) for source in sources) != 1:
            raise ValueError("give exactly one of jwks_url, key_files and introspection")
        return value


class Site(Section):
    """Where this server stands, as GPU.ai shows it to customers."""

    region: Annotated[str, Field(min_length=1, max_length=64)]
    datacenter_location: Annotated[str, Field(min_length=1, max_length=128)]


class PerGpu(Section):
    """What comes with each GPU of an offer."""

    cpu_cores: Annotated[int, Field(ge=1, le=256)]
    memory_gib: Annotated[float, Field(ge=0.25, le=8192)]
    storage_gib: Annotated[int, Field(ge=1, le=65536)]


Price = Annotated[Decimal, Field(ge=0, le=100000, max_digits=12, decimal_places=6)]


class Offer(Section):
    """One GPU type for sale: in which counts, with what beside it, at which price."""

    gpu_type: GpuTypeName
    gpu_counts: Annotated[list[Annotated[int, Field(ge=1, le=16)]], Field(min_length=1)] = [1]
    per_gpu: PerGpu
    price_per_gpu_hour: Annotated[dict[Tier, Price], Field(min_length=1)]

    @field_validator("gpu_counts")
    @classmethod
    def _distinct_counts(cls, counts: list[int]) -> list[int]:
        if len(set(counts)) != len(counts):
            raise ValueError("a count is listed twice")
        return counts


class Stock(Section):
    """From how many sellable units on ``stock_status`` reads High or Medium; below that, Low."""

    medium_from: Annotated[int, Field(ge=1)] = 2
    high_from: Annotated[int, Field(ge=1)] = 4

    @field_validator("high_from")
    @classmethod
    def _high_above_medium(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("medium_from", value):
            raise ValueError("must not be below medium_from")
        return value


class HostReserve(Section):
    """What the host keeps for itself; never sold."""

    cpu_cores: Annotated[int, Field(ge=0)] = 2
    memory_gib: Annotated[float, Field(ge=0)] = 8
    storage_gib: Annotated[int, Field(ge=0)] = 20


class StandIns(Section):
    """Development only: sell emulated devices as if they were GPUs."""

    gpu_type: GpuTypeName
    count: Annotated[int, Field(ge=1, le=16)]


class Gpus(Section):
    """Where the GPUs come from, and how they are handed over."""

    pci_ids: dict[PciIds, GpuTypeName] = {}
    nvml: bool = True
    nvml_timeout_s: Seconds = 20
    nvswitch_board: Literal["refuse", "single", "whole"] = "refuse"
    rombar: bool = False
    stand_ins: list[StandIns] = []


class Libvirt(Section):
    """The hypervisor connection."""

    uri: Annotated[str, Field(pattern=r"^[a-z+]+://")] = "qemu:///system"
    domain_type: Literal["auto", "kvm", "qemu"] = "auto"
    call_timeout_s: Seconds = 30
    threads: Annotated[int, Field(ge=2, le=64)] = 8


class Network(Section):
    """How a guest reaches the network.

    ``network``: the libvirt network ``name``, one address of ``first_address``..``last_address`` per
    instance. ``user``: QEMU's own NAT, for development: it needs no privileges and nobody reaches in,
    but a guest reaches what listens on the host's loopback, at 10.0.2.2.
    """

    mode: Literal["user", "network"] = "network"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,14}$")] = "gpud"
    subnet: IPv4Network = IPv4Network("10.77.0.0/24")
    first_address: IPv4Address | None = None
    last_address: IPv4Address | None = None
    nameservers: list[IPv4Address] = []

    @property
    def gateway(self) -> IPv4Address:
        """The host's own address in the network: the subnet's first."""
        return self.subnet[1]

    @property
    def guest_addresses(self) -> list[IPv4Address]:
        """The addresses that instances may claim, in order."""
        first = int(self.first_address or self.subnet[2])
        last = int(self.last_address or self.subnet[-2])
        return [IPv4Address(number) for number in range(first, last + 1)]

    @field_validator("subnet")
    @classmethod
    def _room_for_guests(cls, subnet: IPv4Network) -> IPv4Network:
        if not 16 <= subnet.prefixlen <= 29:  # noqa: PLR2004
            raise ValueError("must be between a /16 and a /29")
        return subnet

    @field_validator("first_address", "last_address")
    @classmethod
    def _in_subnet(cls, address: IPv4Address | None, info: ValidationInfo) -> IPv4Address | None:
        subnet: IPv4Network | None = info.data.get("subnet")
        if address is None or subnet is None:
            return address
        if not subnet[2] <= address <= subnet[-2]:
            raise ValueError(
                f"is not one of {subnet}'s guest addresses, {subnet[2]} to {subnet[-2]}"
            )
        first = info.data.get("first_address")
        if first is not None and address < first:
            raise ValueError("must not be below first_address")
        return address


class Guest(Section):
    """The VM that an order gets."""

    image: Annotated[str, Field(pattern=rf"^{IMAGE_NAME.pattern}$")] = "base"
    login_user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")] = "ubuntu"
    firmware: Literal["uefi", "bios"] = "uefi"
    script_runs: Literal["every_boot", "once"] = "every_boot"
    on_poweroff: Literal["restart", "terminate"] = "restart"
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 10
    hugepages: Literal["2M", "1G"] | None = None
    console_log_kib: Annotated[int, Field(ge=64, le=1024 * 1024)] = 2048
    estimated_ready_s: Annotated[int, Field(ge=1, le=86400)] = 180

    @property
    def hugepage_kib(self) -> int | None:
        """Size of the huge pages that guests are made of; None for ordinary pages."""
        return {None: None, "2M": 2 * 1024, "1G": 1024 * 1024}[self.hugepages]


class Deadlines(Section):
    """How long each step may take before the order is given up (or, in a release step, reported)."""

    lease_address_s: Seconds = 60
    clone_disk_s: Seconds = 120
    write_seed_s: Seconds = 60
    check_gpus_s: Seconds = 60
    bind_gpus_s: Seconds = 120
    start_domain_s: Seconds = 180
    await_ready_s: Seconds = 900
    stop_domain_s: Seconds = 120
    remove_files_s: Seconds = 60
    return_address_s: Seconds = 60
    clean_gpus_s: Seconds = 120
    return_gpus_s: Seconds = 120

    def of(self, step: Step) -> float | None:
        """Seconds that ``step`` may take; None for steps without end."""
        return getattr(self, f"{step.value}_s", None)


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
