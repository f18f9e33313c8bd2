"""The config file: read, judged in one go, and documented whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from gpud.config import Config, Introspection, StandIns, Tls
from gpud.configfile import load_config, parse_config
from gpud.errors import Code, GpudError
from gpud.model import Step

CONFIG_DIR = Path(__file__).parents[2] / "config"

MINIMAL = """
auth: {issuer: "https://auth.example.com/", audience: [gpud], jwks_url: "https://auth.example.com/jwks"}
site: {region: US, datacenter_location: US-East-1}
"""


def problems(text: str) -> dict[str, str]:
    """What is wrong with a config, by key."""
    with pytest.raises(GpudError) as caught:
        parse_config(text)
    assert caught.value.code is Code.CONFIG_INVALID
    return {one.where: f"{one.what} | {one.hint}" for one in caught.value.problems}


def with_section(section: str) -> str:
    return MINIMAL + section


def model_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every key of the model, down to the leaves, list items included."""
    keys = set()
    for name, field in model.model_fields.items():
        keys.add(f"{prefix}{name}")
        for section in sections_in(field.annotation):
            keys |= model_keys(section, f"{prefix}{name}.")
    return keys


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in sections_in(part)]


def file_keys(data: Any, prefix: str = "") -> set[str]:
    if isinstance(data, list):
        return {key for item in data for key in file_keys(item, prefix)}
    if not isinstance(data, dict):
        return set()
    keys = set()
    for name, value in data.items():
        keys |= {f"{prefix}{name}"} | file_keys(value, f"{prefix}{name}.")
    return keys


def test_the_minimal_config_is_enough() -> None:
    config = parse_config(MINIMAL)
    assert config.offers == []
    assert config.server.port == 8443
    assert config.auth.algorithms == ["RS256"]


def test_the_file_that_a_package_brings_tells_of_each_key_that_must_be_filled_in() -> None:
    text = (CONFIG_DIR / "minimal.yaml").read_text()
    empty = [
        "auth.issuer", "auth.audience", "site.region", "site.datacenter_location", "offers",
    ]  # fmt: skip
    source = {"auth.jwks_url": "give exactly one of jwks_url, key_files and introspection | "}
    assert problems(text) == dict.fromkeys(empty, "not filled in | ") | source


def test_the_file_that_a_package_brings_is_enough_when_its_own_examples_are_filled_in() -> None:
    text = (CONFIG_DIR / "minimal.yaml").read_text()
    filled = re.sub(r"^(  \w+:) +# ", r"\1 ", text, flags=re.MULTILINE)
    config = parse_config(re.sub(r"^#(  (?:- |  )\w+: .*)$", r"\1", filled, flags=re.MULTILINE))
    assert config.offers[0].gpu_counts == [1, 2, 4, 8]
    assert config.site.region == "US"


def test_the_annotated_file_has_every_key_of_the_model() -> None:
    text = (CONFIG_DIR / "gpud.yaml").read_text()
    # Optional sections and the tiers' prices are shown in comments or as values.
    shown_in_comments = set()
    for model, where in (
        (Tls, "server.tls."),
        (Introspection, "auth.introspection."),
        (StandIns, "gpus.stand_ins."),
    ):
        for key in model_keys(model, where):
            assert re.search(rf"#.*\b{key.rsplit('.', 1)[1]}:", text), f"{key} is not in gpud.yaml"
            shown_in_comments.add(key)
    prices = {"offers.price_per_gpu_hour.on_demand", "offers.price_per_gpu_hour.spot"}
    assert file_keys(yaml.safe_load(text)) - prices == model_keys(Config) - shown_in_comments


def test_the_annotated_file_shows_the_defaults() -> None:
    shown = load_config(CONFIG_DIR / "gpud.yaml")
    given = yaml.safe_load((CONFIG_DIR / "gpud.yaml").read_text())
    without_examples = {key: given[key] for key in ("auth", "site", "state_dir")}
    defaults = Config.model_validate_json(json.dumps(without_examples))
    for name in Config.model_fields:
        if name not in {"auth", "site", "offers"}:
            assert getattr(shown, name) == getattr(defaults, name), name
    no_default = {"issuer", "audience", "jwks_url"}
    for name, field in type(shown.auth).model_fields.items():
        if name not in no_default:
            assert getattr(shown.auth, name) == field.default, f"auth.{name}"


def test_every_key_of_the_annotated_file_has_a_meaning_beside_it() -> None:
    """Each group of keys follows a comment: no more than eight keys without one."""
    bare = 0
    for line in (CONFIG_DIR / "gpud.yaml").read_text().splitlines():
        bare = 0 if "#" in line or not line.strip() else bare + 1
        assert bare <= 9, line


def test_the_demo_config_is_valid() -> None:
    config = load_config(CONFIG_DIR / "demo.yaml")
    assert [offer.gpu_type for offer in config.offers] == ["h100_sxm"]


def test_the_readmes_config_is_valid() -> None:
    readme = (CONFIG_DIR.parent / "README.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert sum(len(offer.gpu_counts) for offer in parse_config(shown).offers) == 4


def test_all_problems_are_told_at_once_with_their_keys() -> None:
    found = problems(
        """
auth: {issuer: x, audience: [a], algorithms: [HS256]}
site: {regio: US}
site: {region: US}
server: {port: 70000, body_timeout_s: 30s, lissen: a}
metrics: {port: -1}
offers:
  - {gpu_type: h100_sx, gpu_counts: [1, 1], per_gpu: {cpu_cores: "4", memory_gib: 16GB,
     storage_gib: 0}, price_per_gpu_hour: {weekly: 3}}
network: {mode: bridge, last_address: 10.77.0.1}
"""
    )
    assert found.keys() >= {
        "line 4, site", "server.port", "server.body_timeout_s", "server.lissen", "metrics.port",
        "auth.algorithms[0]", "auth.jwks_url", "site.datacenter_location",
        "offers[0].gpu_type", "offers[0].gpu_counts", "offers[0].per_gpu.cpu_cores",
        "offers[0].per_gpu.memory_gib", "offers[0].per_gpu.storage_gib", "network.mode",
        "network.last_address",
    }  # fmt: skip
    assert "did you mean listen?" in found["server.lissen"]
    assert "a plain number of seconds" in found["server.body_timeout_s"]
    assert "a plain number of GiB" in found["offers[0].per_gpu.memory_gib"]
    assert "first on line 3" in found["line 4, site"]


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("metrics: {port: 8443}", "metrics", "taken by server.port"),
        ("state_dir: var/lib/gpud", "state_dir", "absolute"),
        ("server: {tls: {certificate_file: /a}}", "server.tls.key_file", "missing"),
        ("stock: {medium_from: 5, high_from: 2}", "stock.high_from", "medium_from"),
        ("network: {subnet: 10.77.0.0/31}", "network.subnet", "/16 and a /29"),
        ("network: {subnet: 10.78.0.0/24, first_address: 10.77.0.9}", "network.first_address",
         "10.78.0.2 to 10.78.0.254"),
        ("network: {first_address: 10.77.0.9, last_address: 10.77.0.3}", "network.last_address",
         "below first_address"),
        ("gpus: {stand_ins: [{gpu_type: l40s, count: 0}]}", "gpus.stand_ins[0].count", "greater"),
        ("libvirt: {uri: nonsense}", "libvirt.uri", "pattern"),
        ("libvirt: {domain_type: xen}", "libvirt.domain_type", "'auto', 'kvm' or 'qemu'"),
        ("guest: {login_user: 'Root!'}", "guest.login_user", "pattern"),
        (("offers: [{gpu_type: l40s, per_gpu: {cpu_cores: 1, memory_gib: 1.5, storage_gib: 1},"
         " price_per_gpu_hour: {spot: 1}}]\nguest: {hugepages: 1G}"), "guest", "do not add up to"),
        ("gpus: {pci_ids: {'2330': l40s}}", "gpus.pci_ids.2330", "such as 10de:2330"),
        ("guest: {max_restarts: yes}", "guest.max_restarts", "integer"),
        ("host_reserve: {memory_gib: .inf}", "host_reserve.memory_gib", "less than"),
        ("host_reserve: {memory_gib: 1.0e+300}", "host_reserve.memory_gib", "less than"),
        ("log: {level: loud}", "log.level", "'debug'"),
        ("prices: {}", "prices", "unknown key"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(section: str, key: str, words: str) -> None:
    assert words in problems(with_section(section))[key]


@pytest.mark.parametrize(
    ("auth", "key", "words"),
    [
        ("{issuer: a, audience: [b]}", "auth.jwks_url", "exactly one"),
        ("{issuer: a, audience: [b], jwks_url: 'https://x/y', key_files: [/a.pem]}",
         "auth.jwks_url", "exactly one"),
        ("{issuer: a, audience: [b], jwks_url: 'http://auth.example.com/jwks'}", "auth.jwks_url",
         "loopback only"),
        ("{issuer: a, audience: [b], jwks_url: 'ftp://x'}", "auth.jwks_url", "not an http(s) URL"),
        ("{issuer: a, audience: [b], jwks_url: 'https://x:PORT/y'}", "auth.jwks_url", "port"),
        ("{issuer: a, audience: [b], jwks_url: 'https://x:99999/y'}", "auth.jwks_url", "range"),
        ("{issuer: a, audience: []}", "auth.audience", "at least 1"),
        ("{issuer: '', audience: [b]}", "auth.issuer", "at least 1"),
        (("{issuer: a, audience: [b], introspection: {url: 'https://x/i', client_id: c,"
         " client_secret: {}}}"), "auth.introspection.client_secret.credential", "exactly one"),
        (("{issuer: a, audience: [b], introspection: {url: 'https://x/i', client_id: c,"
         " client_secret: {file: /a, credential: b}}}"),
         "auth.introspection.client_secret.credential", "exactly one"),
        (("{issuer: a, audience: [b], introspection: {url: 'https://x/i', client_id: c,"
         " client_secret: hunter2}}"), "auth.introspection.client_secret", "object"),
    ],
)  # fmt: skip
def test_auth_is_judged(auth: str, key: str, words: str) -> None:
    text = f"auth: {auth}\nsite: {{region: US, datacenter_location: x}}"
    found = problems(text)
    assert words in found[key]
    assert "introspection" not in auth or len(found) == 1
    assert "hunter2" not in str(found)


OFFER = ("{gpu_type: %s, per_gpu: {cpu_cores: 1, memory_gib: 1, storage_gib: 1}, "
         "price_per_gpu_hour: {on_demand: %s}}")  # fmt: skip


def test_a_type_offered_twice_is_refused() -> None:
    offer = OFFER % ("l40s", "1")
    assert "offered twice" in problems(with_section(f"offers: [{offer}, {offer}]"))["offers"]


def test_a_negative_price_is_refused() -> None:
    offers = f"offers: [{OFFER % ('l40s', '-1')}]"
    assert "offers[0].price_per_gpu_hour.on_demand" in problems(with_section(offers))


def test_stand_ins_must_be_of_an_offered_type() -> None:
    text = f"offers: [{OFFER % ('l40s', '1')}]\ngpus: {{stand_ins: [{{gpu_type: rtx_4090, count: 1}}]}}"
    assert "not offered" in problems(with_section(text))["gpus"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/jwks", "http://localhost/x", "http://[::1]/x"])
def test_plain_http_is_accepted_for_loopback(url: str) -> None:
    text = MINIMAL.replace("https://auth.example.com/jwks", url)
    assert parse_config(text).auth.jwks_url == url


def test_a_price_keeps_its_digits() -> None:
    config = parse_config(with_section(f"offers: [{OFFER % ('l40s', '3.49')}]"))
    assert (
        str(config.offers[0].price_per_gpu_hour)
        == "{<Tier.ON_DEMAND: 'on_demand'>: Decimal('3.49')}"
    )


def test_text_that_is_no_mapping_is_refused() -> None:
    assert "(top level)" in problems("- a\n- b\n")


def test_an_empty_file_lists_what_is_missing() -> None:
    assert problems("").keys() == {"auth", "site"}


def test_text_that_is_no_yaml_is_refused_with_its_line() -> None:
    with pytest.raises(GpudError, match=r"is not YAML(.|\n)*line 2"):
        parse_config("site: {}\nauth: ]\n")


def test_a_line_that_is_no_yaml_is_not_repeated() -> None:
    with pytest.raises(GpudError) as refused:
        parse_config("auth: {}\nsecret: 'hush-hush' @\n")
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "site: {region: 2024-13-45}",
        "site: &a {region: *a}",
        "{2024-12-24: x}",
        "[" * 5000 + "]" * 5000,
    ],
    ids=["a day that is none", "in itself", "a day for a key", "too deep"],
)
def test_yaml_that_nothing_can_be_made_of_is_refused(text: str) -> None:
    with pytest.raises(GpudError, match="config is not YAML") as refused:
        parse_config(text)
    assert refused.value.code is Code.CONFIG_INVALID


def test_yaml_cannot_make_objects() -> None:
    with pytest.raises(GpudError, match="is not YAML"):
        parse_config("a: !!python/object/apply:os.system ['true']")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(GpudError, match=r"cannot read .*missing\.yaml"):
        load_config(tmp_path / "missing.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GpudError, match="cannot read"):
        load_config(tmp_path / "binary.yaml")


def test_an_unknown_key_inside_a_value_that_is_no_section_gets_no_hint() -> None:
    found = problems(with_section("gpus: {stand_ins: [{gpu_type: l40s, count: 1, countt: 1}]}"))
    assert "did you mean count?" in found["gpus.stand_ins[0].countt"]


def test_systemds_directories_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/srv/state:/srv/other")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/here")
    config = parse_config(MINIMAL)
    assert config.state_dir == Path("/srv/state")
    assert config.admin_socket_path == Path("/run/here/gpud.sock")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    assert config.admin_socket_path == Path("/srv/state/gpud.sock")
    explicit = parse_config(with_section("admin_socket: /run/gpud.sock"))
    assert explicit.admin_socket_path == Path("/run/gpud.sock")


def test_addresses_default_to_the_whole_subnet_but_the_gateway() -> None:
    network = parse_config(with_section("network: {subnet: 10.9.0.0/29}")).network
    assert str(network.gateway) == "10.9.0.1"
    assert [str(address) for address in network.guest_addresses] == [
        "10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.5", "10.9.0.6",
    ]  # fmt: skip


def test_every_step_but_running_and_ended_has_a_deadline() -> None:
    deadlines = parse_config(MINIMAL).deadlines
    without = {step for step in Step if deadlines.of(step) is None}
    assert without == {Step.RUNNING, Step.ENDED}
