"""What differs between two configurations, and whether that needs a restart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpud.config import RELOADED, Config, changes
from gpud.configfile import parse_config

FILE = Path(__file__).parents[3] / "config" / "gpud.yaml"


def shipped() -> Any:
    """What the annotated file says."""
    return yaml.load(FILE.read_text(), yaml.CSafeLoader)


def config(**sections: Any) -> Config:
    """The annotated file's, with sections changed."""
    given = shipped()
    for name, values in sections.items():
        given[name] = {**given[name], **values} if isinstance(values, dict) else values
    return parse_config(json.dumps(given))


def told(**sections: Any) -> dict[str, bool]:
    """Every change in words, and whether it takes effect by a reload."""
    return {str(change): change.reloaded for change in changes(config(), config(**sections))}


def test_the_same_file_changes_nothing() -> None:
    assert changes(config(), config()) == []


@pytest.mark.parametrize(
    ("sections", "change"),
    [
        ({"stock": {"high_from": 9}}, "stock.high_from: 4 -> 9"),
        ({"site": {"region": "EU"}}, "site.region: US -> EU"),
        ({"guest": {"image": "other"}}, "guest.image: base -> other"),
        ({"log": {"level": "debug"}}, "log.level: info -> debug"),
        ({"price_per_hour_is": "gpu"}, "price_per_hour_is: offering -> gpu"),
        ({"server": {"limits": {"orders_per_minute": None}}},
         "server.limits.orders_per_minute: 120 -> none"),
        ({"server": {"trusted_proxies": ["10.0.0.0/8"]}},
         "server.trusted_proxies[0]: none -> 10.0.0.0/8"),
    ],
)  # fmt: skip
def test_what_is_sold_and_who_may_call_is_reloaded(sections: Any, change: str) -> None:
    assert told(**sections) == {change: True}


def test_prices_are_told() -> None:
    offers = shipped()["offers"]
    offers[0]["price_per_gpu_hour"]["spot"] = 2.49
    offers[0]["gpu_counts"] = [1, 2]
    assert told(offers=offers) == {
        "offers[0].gpu_counts[2]: 4 -> none": True,
        "offers[0].gpu_counts[3]: 8 -> none": True,
        "offers[0].price_per_gpu_hour.spot: 1.99 -> 2.49": True,
    }
    assert "offers[0].gpu_type: h100_sxm -> none" in told(offers=[])


def test_tls_is_reloaded() -> None:
    tls = {"certificate_file": "/a", "key_file": "/b"}
    assert told(server={"tls": tls}) == {
        "server.tls.certificate_file: none -> /a": True,
        "server.tls.key_file: none -> /b": True,
    }


def test_values_of_auth_are_not_told() -> None:
    assert told(auth={"jwks_url": "https://user:hunter2@x/jwks", "audience": ["b"]}) == {
        "auth.jwks_url": True,
        "auth.audience[0]": True,
    }


@pytest.mark.parametrize(
    ("sections", "change"),
    [
        ({"state_dir": "/srv/gpud"}, "state_dir: /var/lib/gpud -> /srv/gpud"),
        ({"admin_socket": "/run/x.sock"}, "admin_socket: none -> /run/x.sock"),
        ({"server": {"port": 443}}, "server.port: 8443 -> 443"),
        ({"server": {"listen": "::"}}, "server.listen: 0.0.0.0 -> ::"),
        ({"metrics": {"port": 1}}, "metrics.port: 9487 -> 1"),
        ({"libvirt": {"uri": "qemu:///session"}}, "libvirt.uri: qemu:///system -> qemu:///session"),
        ({"network": {"name": "other"}}, "network.name: gpud -> other"),
        ({"guest": {"firmware": "bios"}}, "guest.firmware: uefi -> bios"),
        ({"gpus": {"pci_ids": {"10de:2324": "h100_sxm"}}},
         "gpus.pci_ids.10de:2324: none -> h100_sxm"),
        ({"deadlines": {"await_ready_s": 1.0}}, "deadlines.await_ready_s: 900.0 -> 1.0"),
        ({"history": {"events_days": 1}}, "history.events_days: 90 -> 1"),
    ],
)  # fmt: skip
def test_how_the_daemon_is_made_needs_a_restart(sections: Any, change: str) -> None:
    assert told(**sections) == {change: False}


def test_every_key_that_is_reloaded_is_a_key() -> None:
    known = config().model_dump()
    for key in RELOADED:
        place: Any = known
        for part in key.split("."):
            place = place[part]


def test_the_annotated_file_lists_the_keys_that_are_reloaded() -> None:
    (listed,) = re.findall(
        r"each with all that is in it: (.*?)\.\n# A file", FILE.read_text(), re.DOTALL
    )
    at_large, _, of_server = re.sub(r"\s*\n#\s*", " ", listed).partition(", and of server: ")
    keys = {*at_large.split(", "), *(f"server.{key}" for key in of_server.split(", "))}
    assert keys == RELOADED
