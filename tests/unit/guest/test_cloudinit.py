"""The seed's texts: golden files for people to read, and properties for what must never break.

``GPUD_REGENERATE=1 pytest tests/unit/guest/test_cloudinit.py`` writes the golden files anew.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from decimal import Decimal
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gpud.configfile import parse_config
from gpud.guest.cloudinit import SCRIPT_FILE, GuestSpec, render, template
from gpud.hypervisor.domainxml import CHANNEL_NAME
from gpud.model import Grant, GuestInput, Instance, Shape, Status, Step, Tier

GOLDEN = Path(__file__).parents[2] / "data" / "seed"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDhJXam+MTC9Ox+1yzbQxgUUvBOoJkrvQ5MOmF3XjUM2 jörg@büro 日本"

USER_MODE = GuestSpec(
    upstream_id="i-0123456789abcdef",
    mac="52:12:34:56:78:90",
    interface=IPv4Interface("10.0.2.15/24"),
    gateway=IPv4Address("10.0.2.2"),
    nameservers=(IPv4Address("10.0.2.3"),),
    login_user="ubuntu",
    script_runs="every_boot",
    given=GuestInput((KEY,), None, b"#!/bin/sh\r\necho 'EOF'\n"),
)
CASES = {
    "user-mode": USER_MODE,
    "container": replace(USER_MODE, given=GuestInput((), "ghcr.io/acme/train:v1", None)),
    "network-once": replace(
        USER_MODE,
        interface=IPv4Interface("10.77.0.10/24"),
        gateway=IPv4Address("10.77.0.1"),
        nameservers=(IPv4Address("10.77.0.1"), IPv4Address("9.9.9.9")),
        login_user="tenant",
        script_runs="once",
    ),
}


def user_data(spec: GuestSpec) -> Any:
    text = render(spec)["user-data"]
    assert text.startswith(b"#cloud-config\n")
    return yaml.safe_load(text)


@pytest.mark.parametrize("name", CASES)
def test_seed_reads_as_recorded(name: str) -> None:
    for file, text in render(CASES[name]).items():
        golden = GOLDEN / name / file
        if os.environ.get("GPUD_REGENERATE"):
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_bytes(text)
        assert golden.read_bytes() == text, f"{golden} differs"


@given(st.binary())
def test_script_is_carried_byte_for_byte(script: bytes) -> None:
    seed = render(replace(USER_MODE, given=GuestInput(startup_script=script)))
    assert seed[SCRIPT_FILE] == script


def test_script_appears_nowhere_else() -> None:
    seed = render(replace(USER_MODE, given=GuestInput(startup_script=b"s3cret")))
    assert [name for name, text in seed.items() if b"s3cret" in text] == [SCRIPT_FILE]


def test_no_script_makes_no_file() -> None:
    assert SCRIPT_FILE not in render(replace(USER_MODE, given=GuestInput()))


printable = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1)


@given(st.lists(printable, max_size=5))
def test_keys_arrive_as_they_were_given(keys: list[str]) -> None:
    data = user_data(replace(USER_MODE, given=GuestInput(tuple(keys))))
    assert data["users"][0]["ssh_authorized_keys"] == keys


@given(st.binary(min_size=5, max_size=5))
def test_mac_is_text_to_every_yaml_reader(octets: bytes) -> None:
    mac = ":".join(f"{octet:02x}" for octet in b"\x52" + octets)
    text = render(replace(USER_MODE, mac=mac))["network-config"]
    nic = yaml.safe_load(text)["ethernets"]["nic0"]
    assert nic["match"]["macaddress"] == mac
    assert re.search(rb"macaddress: ['\"]", text)


def test_container_unit_runs_the_image_with_all_gpus() -> None:
    files = {file["path"]: file["content"] for file in user_data(CASES["container"])["write_files"]}
    unit = files["/etc/systemd/system/gpud-container.service"]
    assert re.search(
        r"^ExecStart=/usr/bin/docker run .*--gpus all .*ghcr\.io/acme/train:v1$", unit, re.MULTILINE
    )
    assert "@IMAGE@" not in unit


def test_only_ordered_units_are_enabled() -> None:
    assert user_data(USER_MODE)["bootcmd"][0][4:] == ["gpud-script.service"]
    enabled = user_data(CASES["container"])["bootcmd"][0][4:]
    assert enabled == ["gpud-script.service", "gpud-container.service"]


def test_files_are_written_before_they_are_started() -> None:
    modules = user_data(USER_MODE)["cloud_init_modules"]
    assert modules.index("write_files") < modules.index("bootcmd")


def test_the_login_is_made_in_the_stage_that_the_network_waits_for() -> None:
    data = user_data(USER_MODE)
    assert {"users_groups", "ssh"} <= set(data["cloud_init_modules"])
    assert data["cloud_config_modules"] == ["growpart", "resizefs"]


def test_growing_the_disk_holds_nothing_up() -> None:
    assert template("boot.sh").endswith("grow >/dev/null 2>&1 &\n")


@pytest.mark.real_command("sh")
@pytest.mark.parametrize("name", ["run.sh", "boot.sh"])
def test_shell_templates_are_posix_shell(name: str) -> None:
    subprocess.run(["sh", "-n"], input=template(name), text=True, check=True)


def test_guests_report_on_the_port_that_the_domain_has() -> None:
    assert f"port={CHANNEL_NAME}\n" in template("run.sh")


CONFIG = """
auth: {issuer: x, audience: [a], jwks_url: "https://a/b"}
site: {region: US, datacenter_location: x}
guest: {login_user: me, script_runs: once}
network: {mode: network, subnet: 10.9.0.0/28%s}
"""


def instance(address: str | None) -> Instance:
    grant = Grant(
        Shape("l40s", 1, 1, 1024, 5), (), IPv4Address(address) if address else None, "sha256:0",
        Decimal(1), "US", "x",
    )  # fmt: skip
    return Instance(
        "i-0123456789abcdef", "a", "f", Tier.SPOT, grant, Status.CREATING, Step.WRITE_SEED, 0, 0
    )


def test_spec_of_an_instance_in_the_network() -> None:
    spec = GuestSpec.of(instance("10.9.0.5"), GuestInput(), parse_config(CONFIG % ""))
    assert str(spec.interface) == "10.9.0.5/28"
    assert str(spec.gateway) == "10.9.0.1"
    assert spec.nameservers == (IPv4Address("10.9.0.1"),)
    assert (spec.login_user, spec.script_runs) == ("me", "once")


def test_spec_of_an_instance_in_user_mode() -> None:
    config = parse_config(CONFIG.replace("mode: network", "mode: user") % "")
    spec = GuestSpec.of(instance(None), GuestInput(), config)
    assert spec.interface == IPv4Interface("10.0.2.15/24")
    assert spec.nameservers == (IPv4Address("10.0.2.3"),)


@pytest.mark.parametrize("address", [None, "10.9.0.5"])
def test_configured_nameservers_come_first(address: str | None) -> None:
    config = parse_config(CONFIG % ", nameservers: [9.9.9.9]")
    assert GuestSpec.of(instance(address), GuestInput(), config).nameservers == (
        IPv4Address("9.9.9.9"),
    )
