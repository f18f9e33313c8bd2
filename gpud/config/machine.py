"""The server's own parts: GPUs, hypervisor, network."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from gpud.config.section import Section
from gpud.configtypes import GpuTypeName, PciIds, Seconds


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
