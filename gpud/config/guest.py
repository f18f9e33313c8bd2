"""The VM that an order gets, and how long each step towards it may take."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from gpud.config.section import Section
from gpud.configtypes import Seconds
from gpud.model import Step

IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


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
