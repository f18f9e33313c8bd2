"""What a guest is told at its first boot: cloud-init's NoCloud seed, as a pure function.

The startup script is what connects the instance, so the guest's boot is arranged around it
(``cloud-init/README.md`` has the measurements):

- ``dsmode: local`` lets cloud-init run its first modules before the network is brought up, instead
  of after it; a cloud-init that ignores it runs the same modules one stage later.
- Only modules that prepare the script, the login and the disk are run.
- The script is started by a systemd unit as soon as there is a route, beside the rest of the boot.
- The network is configured statically, so nothing waits for DHCP.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from ipaddress import IPv4Address, IPv4Interface
from typing import Any, Final, Literal, Self

import yaml

from gpud.config import Config
from gpud.model import GuestInput, Instance

SCRIPT_FILE: Final = "startup-script"
"""Name of the startup script in the seed, where it lies byte for byte."""

_DIRECTORY: Final = "/usr/local/lib/gpud"
_UNITS: Final = "/etc/systemd/system"

# QEMU's user-mode network is the same for every guest (qemu-system manual, "-netdev user").
_USER_MODE_ADDRESS: Final = IPv4Interface("10.0.2.15/24")
_USER_MODE_GATEWAY: Final = IPv4Address("10.0.2.2")
_USER_MODE_NAMESERVER: Final = IPv4Address("10.0.2.3")

# bootcmd grows the disk and starts the script's unit, beside the modules after it. The unit waits for
# the network, which waits for this stage: so the login is made when the script starts.
_FIRST_MODULES: Final = [
    "write_files",
    "bootcmd",
    "set_hostname",
    "update_etc_hosts",
    "users_groups",
    "ssh",
]
_LATER_MODULES: Final = ["growpart", "resizefs"]


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """Everything the seed depends on.

    Attributes:
        upstream_id: Becomes cloud-init's instance-id and the hostname: new for every instance, the
            same at each of its boots.
        mac: The NIC that the network configuration is for.
        interface: The guest's address with its prefix length.
        gateway: Where its default route leads.
        nameservers: Who resolves names for it.
        login_user: Who may log in with the ordered keys.
        script_runs: At every boot, or at the first only.
        given: What the caller ordered for the inside of the guest.
    """

    upstream_id: str
    mac: str
    interface: IPv4Interface
    gateway: IPv4Address
    nameservers: tuple[IPv4Address, ...]
    login_user: str
    script_runs: Literal["every_boot", "once"]
    given: GuestInput

    @classmethod
    def of(cls, instance: Instance, given: GuestInput, config: Config) -> Self:
        """What this instance's guest is told under this config."""
        network, address = config.network, instance.grant.address
        if address is None:
            interface, gateway = _USER_MODE_ADDRESS, _USER_MODE_GATEWAY
            nameservers = network.nameservers or [_USER_MODE_NAMESERVER]
        else:
            interface = IPv4Interface(f"{address}/{network.subnet.prefixlen}")
            gateway = network.gateway
            nameservers = network.nameservers or [network.gateway]
        return cls(
            upstream_id=instance.upstream_id,
            mac=instance.mac,
            interface=interface,
            gateway=gateway,
            nameservers=tuple(nameservers),
            login_user=config.guest.login_user,
            script_runs=config.guest.script_runs,
            given=given,
        )


def render(spec: GuestSpec) -> dict[str, bytes]:
    """The files of the seed by their names."""
    seed = {
        "meta-data": _yaml(_meta_data(spec)),
        "network-config": _yaml(_network_config(spec)),
        "user-data": b"#cloud-config\n" + _yaml(_user_data(spec)),
    }
    if spec.given.startup_script is not None:
        seed[SCRIPT_FILE] = spec.given.startup_script
    return seed


def template(name: str) -> str:
    """A file of ``cloud-init/``."""
    return files("gpud.data").joinpath("cloud-init", name).read_text(encoding="utf-8")


def _meta_data(spec: GuestSpec) -> dict[str, Any]:
    return {
        "instance-id": spec.upstream_id,
        "local-hostname": spec.upstream_id,
        "dsmode": "local",
    }


def _network_config(spec: GuestSpec) -> dict[str, Any]:
    nic = {
        "match": {"macaddress": spec.mac},
        "addresses": [str(spec.interface)],
        # Not gateway4, which netplan has deprecated; nor "default", which older ones do not know.
        "routes": [{"to": "0.0.0.0/0", "via": str(spec.gateway)}],
        "nameservers": {"addresses": [str(address) for address in spec.nameservers]},
    }
    return {"version": 2, "ethernets": {"nic0": nic}}


def _user_data(spec: GuestSpec) -> dict[str, Any]:
    units = {"gpud-script.service": template("gpud-script.service")}
    if spec.given.docker_image is not None:
        units["gpud-container.service"] = template("gpud-container.service").replace(
            "@IMAGE@", spec.given.docker_image
        )
    return {
        "hostname": spec.upstream_id,
        "manage_etc_hosts": "localhost",
        "users": [_login_user(spec)],
        "ssh_genkeytypes": ["ed25519"],
        "write_files": [
            _file(f"{_DIRECTORY}/run", template("run.sh"), "0755"),
            _file(f"{_DIRECTORY}/runs", spec.script_runs + "\n", "0644"),
            *(_file(f"{_UNITS}/{name}", text, "0644") for name, text in units.items()),
        ],
        "bootcmd": [["sh", "-c", template("boot.sh"), "gpud-boot", *units]],
        "cloud_init_modules": _FIRST_MODULES,
        "cloud_config_modules": _LATER_MODULES,
        "cloud_final_modules": [],
    }


def _login_user(spec: GuestSpec) -> dict[str, Any]:
    return {
        "name": spec.login_user,
        "groups": ["sudo"],
        "sudo": "ALL=(ALL) NOPASSWD:ALL",
        "shell": "/bin/bash",
        "lock_passwd": True,
        "ssh_authorized_keys": list(spec.given.ssh_public_keys),
    }


def _file(path: str, content: str, permissions: str) -> dict[str, str]:
    return {"path": path, "permissions": permissions, "content": content}


class _Dumper(yaml.CSafeDumper):
    """Writes texts of several lines as blocks, and says everything in full."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def _represent_text(dumper: yaml.CSafeDumper, text: str) -> yaml.ScalarNode:
    # YAML 1.1 takes 52:54:00:12:34:56 for a number in base 60 (its "int" type), hence the quotes.
    style = "|" if "\n" in text else '"' if ":" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _yaml(data: dict[str, Any]) -> bytes:
    text: str = yaml.dump(data, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=4096)
    return text.encode()
