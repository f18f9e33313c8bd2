"""Types of values that the configuration is made of, each with its own check."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from yarl import URL

from gpud.model import GPU_TYPES


def _known_gpu_type(identifier: str) -> str:
    if identifier not in GPU_TYPES:
        raise ValueError(f"unknown GPU type; one of {', '.join(GPU_TYPES)}")
    return identifier


def _private_or_https(url: str) -> str:
    parts = URL(url)  # what requests are made with; raises for a port that is none
    if parts.scheme not in {"http", "https"} or not parts.host:
        raise ValueError("not an http(s) URL")
    if parts.scheme == "http":
        try:
            loopback = ip_address(parts.host).is_loopback
        except ValueError:
            loopback = parts.host == "localhost"
        if not loopback:
            raise ValueError("plain http is accepted for loopback only; use https")
    return url


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _pci_ids(ids: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{4}", ids.lower()):
        raise ValueError("not vendor:device, such as 10de:2330 (lspci -n shows them)")
    return ids.lower()


GpuTypeName = Annotated[str, AfterValidator(_known_gpu_type)]
HttpsUrl = Annotated[str, AfterValidator(_private_or_https)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
PciIds = Annotated[str, AfterValidator(_pci_ids)]
