"""What is told of the configuration's keys, and that the documents tell the same."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpud import explained
from gpud.cli import main

REFERENCE = Path(__file__).parents[2] / "docs/configuration.md"


@cache
def topics() -> list[explained.Topic]:
    return list(explained.topics())


def key(path: str) -> str:
    """What is told of one key."""
    (found,) = (str(one) for topic in topics() for one in topic.keys if one.path == path)
    return found


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("server.port", "a whole number from 1 to 65535; `8443` by default"),
        ("server.tls", "a mapping or `null`; `null` by default"),
        ("server.trusted_proxies", "a list of networks; `[]` by default"),
        ("server.limits.orders_per_minute",
         "a whole number from 10 to 1000000 or `null`; `120` by default"),
        ("auth.issuer", "text; required"),
        ("auth.jwks_refresh_s", "a number above 0, to 86400; `600` by default"),
        ("auth.key_files", "a list of paths; `[]` by default"),
        ("offers", "a list of mappings; `[]` by default"),
        ("offers[].gpu_counts", "a list of whole numbers from 1 to 16; `[1]` by default"),
        ("offers[].price_per_gpu_hour.spot", "a number from 0.0 to 100000.0"),
        ("gpus.nvswitch_board", "`refuse`, `single`, `whole`; `\"refuse\"` by default"),
        ("gpus.pci_ids", "a mapping; `{}` by default"),
        ("gpus.nvml", "`true` or `false`; `true` by default"),
        ("guest.hugepages", "`2M`, `1G` or `null`; `null` by default"),
        ("network.nameservers", "a list of addresses; `[]` by default"),
        ("stock.high_from", "a whole number from 1; `4` by default"),
        ("state_dir", "a path"),
    ],
)  # fmt: skip
def test_what_a_key_may_be(path: str, told: str) -> None:
    assert key(path) == f"`{path}`: {told}"


def test_keys_of_an_entry_of_a_list_are_in_their_list() -> None:
    (topic,) = (one for one in topics() if one.keys[0].path == "offers[].gpu_type")
    assert topic.is_about("offers")
    assert not topic.is_about("offer")


def test_the_reference_in_the_documents_is_this_one() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == explained.document(), "run `make docs`"


def test_one_key_is_explained_with_what_is_below_it() -> None:
    told = CliRunner().invoke(main, ["config", "explain", "metrics", "auth.scopes"])
    assert told.exit_code == 0
    assert "Prometheus scrapes here" in told.output
    assert "`metrics.port`: a whole number" in told.output
    assert "must be in the token's scope" in told.output
    assert "libvirt" not in told.output


def test_a_key_that_is_not_there_is_named_with_those_near_it() -> None:
    told = CliRunner().invoke(main, ["config", "explain", "server.prot"])
    assert told.exit_code == 1
    assert "there is no key server.prot" in told.output
    assert "server.port" in told.output
