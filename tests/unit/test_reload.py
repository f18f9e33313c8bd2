"""Another configuration while the daemon runs: the file, the signal and the listener are real."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from gpud import adminclient, app
from gpud import reload as reload_module
from gpud.config import Config
from gpud.configfile import load_config
from gpud.dev.issuer import Issuer, new_key, running_issuer
from gpud.errors import Code, GpudError
from gpud.guest.image import ImageStore
from gpud.reload import Reload
from gpud.statefile import claim
from tests.machine.processes import free_port
from tests.unit.certificates import Tls
from tests.unit.conftest import KeyMaker
from tests.unit.service import make_qcow2

pytestmark = pytest.mark.real_command("head", "qemu-img")

AVAILABLE = "/v1/gpu/available"
ORDER = {"gpu_type": "l40s", "gpu_count": 1, "tier": "on_demand"}


class Server:
    """A daemon, its configuration file, and who asks it."""

    def __init__(self, state_dir: Path, issuer: Issuer, session: aiohttp.ClientSession) -> None:
        self.issuer = issuer
        self.session = session
        self.token = issuer.mint(scope="gpu")
        self.file = state_dir / "gpud.yaml"
        self.settings: dict[str, Any] = {
            "state_dir": str(state_dir),
            "server": {"listen": "127.0.0.1", "port": free_port()},
            "metrics": {"port": free_port()},
            "auth": {
                "issuer": issuer.url,
                "audience": ["gpud"],
                "jwks_url": f"{issuer.url}/.well-known/jwks.json",
            },
            "site": {"region": "US", "datacenter_location": "here"},
            "offers": [
                {
                    "gpu_type": "l40s",
                    "per_gpu": {"cpu_cores": 1, "memory_gib": 0.25, "storage_gib": 1},
                    "price_per_gpu_hour": {"on_demand": 1},
                }
            ],
            "host_reserve": {"cpu_cores": 0, "memory_gib": 0, "storage_gib": 0},
            "gpus": {"stand_ins": [{"gpu_type": "l40s", "count": 1}]},
            "network": {"mode": "user"},
            "libvirt": {"uri": "test:///default"},
        }
        self.write()
        self.reload: Reload

    @property
    def config(self) -> Config:
        return load_config(self.file)

    def write(self, **sections: Any) -> None:
        """Change sections of the file; a mapping goes over the one before."""
        for name, values in sections.items():
            before = self.settings.get(name, {})
            self.settings[name] = {**before, **values} if isinstance(values, dict) else values
        self.file.write_text(json.dumps(self.settings))

    def set_price(self, price: float) -> None:
        self.settings["offers"][0]["price_per_gpu_hour"]["on_demand"] = price
        self.write()

    async def ask(self, path: str = AVAILABLE, **more: Any) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.settings['server']['port']}{path}"
        headers = {"Authorization": f"Bearer {self.token}"}
        method = "POST" if more else "GET"
        async with self.session.request(method, url, headers=headers, **more) as answer:
            return answer.status, await answer.json(content_type=None)

    async def offerings(self) -> list[dict[str, Any]]:
        status, body = await self.ask()
        assert status == 200
        return list(body["offerings"])

    async def selling(self) -> None:
        async with asyncio.timeout(10):
            while not await self.offerings():
                await asyncio.sleep(0.005)

    async def metric(self, name: str) -> float:
        url = f"http://127.0.0.1:{self.settings['metrics']['port']}/metrics"
        async with self.session.get(url) as answer:
            page = await answer.text()
        found = text_string_to_metric_families(page)
        return next(one.value for family in found for one in family.samples if one.name == name)

    async def refused(self) -> dict[str, str]:
        """The problems that a reload is refused for, by key."""
        before = await self.ask()
        with pytest.raises(GpudError) as caught:
            await self.reload.reload()
        assert caught.value.code is Code.CONFIG_INVALID
        assert await self.ask() == before
        return {problem.where: str(problem) for problem in caught.value.problems}


OpenServer = Callable[..., Any]


@pytest.fixture
async def issuer(key_maker: KeyMaker) -> AsyncIterator[Issuer]:
    async with running_issuer(
        client_id="c", client_secret="s", audience="gpud", key_maker=key_maker
    ) as issuer:
        yield issuer


@pytest.fixture
async def start(tmp_path: Path, issuer: Issuer) -> AsyncIterator[OpenServer]:
    """Start a daemon with sections of the file changed."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())

        async def started(**sections: Any) -> Server:
            server = Server(tmp_path, issuer, session)
            server.write(**sections)
            reread = partial(load_config, server.file)
            running = app.running(server.config, reread, claim(server.config.state_dir))
            server.reload = await stack.enter_async_context(running)
            return server

        yield started


@pytest.fixture
async def server(start: OpenServer) -> Server:
    server: Server = await start()
    return server


async def add_image(server: Server, name: str = "base") -> None:
    source = server.file.with_name("source.qcow2")
    if not source.exists():
        make_qcow2(source)
    await ImageStore(server.config.state_dir / "images").add(source, name)


async def test_prices_change_and_what_was_sold_keeps_its_own(start: OpenServer) -> None:
    server = await start(gpus={"stand_ins": [{"gpu_type": "l40s", "count": 2}]})
    await add_image(server)
    await server.selling()
    status, first = await server.ask("/v1/instances", json={**ORDER, "instance_id": "a"})
    assert (status, first["cost_per_hour"]) == (201, 1)
    server.set_price(2.5)
    assert await server.reload.reload() == ["offers[0].price_per_gpu_hour.on_demand: 1 -> 2.5"]
    assert [one["price_per_hour"] for one in await server.offerings()] == [2.5]
    _, again = await server.ask("/v1/instances", json={**ORDER, "instance_id": "a"})
    assert again["cost_per_hour"] == 1
    _, second = await server.ask("/v1/instances", json={**ORDER, "instance_id": "b"})
    assert second["cost_per_hour"] == 2.5


async def test_the_hosts_reserve_counts_at_once(server: Server) -> None:
    await add_image(server)
    await server.selling()
    server.write(host_reserve={"storage_gib": 1_000_000})
    await server.reload.reload()
    assert await server.offerings() == []
    server.write(host_reserve={"storage_gib": 0})
    await server.reload.reload()
    assert len(await server.offerings()) == 1


async def test_another_image_and_new_offers_are_sold(server: Server) -> None:
    await add_image(server, "other")
    assert await server.offerings() == []
    offers = [*server.settings["offers"], {**server.settings["offers"][0], "gpu_type": "rtx_4090"}]
    server.write(guest={"image": "other"}, site={"region": "EU"}, offers=offers)
    await server.reload.reload()
    await server.selling()
    assert [one["region"] for one in await server.offerings()] == ["EU"]
    assert await server.metric("gpud_guest_image_usable") == 1


async def test_nothing_to_change(server: Server) -> None:
    assert await server.reload.reload() == []


async def test_a_bad_file_is_refused_with_every_problem(server: Server) -> None:
    server.write(server={"header_timeout_s": "soon", "lisen": 1}, stock={"medium_from": 0})
    with capture_logs() as logs:
        problems = await server.refused()
    assert problems.keys() == {"server.header_timeout_s", "server.lisen", "stock.medium_from"}
    (told,) = [log for log in logs if log["log_level"] == "error"]
    assert all(key in told["error"] for key in problems)
    server.file.unlink()
    assert await server.refused() == {}


async def test_what_needs_a_restart_is_refused_wholly_and_named(server: Server) -> None:
    server.write(server={"port": 1}, libvirt={"threads": 4}, price_per_hour_is="gpu")
    server.settings["server"]["port"] = server.reload._in_force.config.server.port
    with capture_logs() as logs:
        problems = await server.refused()
    assert problems.keys() == {"server.port", "libvirt.threads"}
    assert "is 8, would be 4 (restart gpud to change it)" in problems["libvirt.threads"]
    assert server.reload._in_force.config.price_per_hour_is == "offering"
    assert "systemctl restart gpud" in str(logs)


async def test_files_that_are_named_and_cannot_be_used_are_refused_together(
    server: Server, tmp_path: Path
) -> None:
    key = tmp_path / "missing.pem"
    tls = {"certificate_file": str(tmp_path / "no.crt"), "key_file": str(tmp_path / "no.key")}
    auth = {"jwks_url": None, "key_files": [str(key)]}
    server.write(server={"tls": tls, "max_body_bytes": 2048}, auth=auth)
    problems = await server.refused()
    assert problems.keys() == {"server.tls", str(key)}
    assert server.reload._in_force.config.server.max_body_bytes == 2**20


async def test_with_one_of_them_good_the_file_is_refused_too(
    server: Server, tmp_path: Path
) -> None:
    tls = {"certificate_file": str(tmp_path / "no.crt"), "key_file": str(tmp_path / "no.key")}
    server.write(server={"tls": tls})
    assert (await server.refused()).keys() == {"server.tls"}
    server.write(auth={"client_ids": ["somebody"]})
    assert (await server.refused()).keys() == {"server.tls"}
    assert not server.reload._in_force.authenticator._judge._source._closed  # type: ignore[attr-defined]


async def test_tokens_are_judged_anew_when_auth_changes(server: Server) -> None:
    assert (await server.ask())[0] == 200
    server.write(auth={"audience": ["another"]})
    assert await server.reload.reload() == ["auth.audience[0]"]
    status, refused = await server.ask()
    assert (status, refused["code"]) == (401, "invalid_token")
    server.write(auth={"audience": ["gpud"]})
    await server.reload.reload()
    assert (await server.ask())[0] == 200


async def test_an_issuer_whose_keys_cannot_be_fetched_is_refused(server: Server) -> None:
    server.write(auth={"jwks_url": f"http://127.0.0.1:{free_port()}/jwks"})
    problems = await server.refused()
    assert "no keys could be fetched" in problems["auth"]


async def test_keys_that_were_had_stay_while_the_issuer_is_away(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await server.ask())[0] == 200

    def away(*_: object, **__: object) -> None:
        raise aiohttp.ClientConnectionError

    monkeypatch.setattr(aiohttp.ClientSession, "get", away)
    server.set_price(2)
    with capture_logs() as logs:
        assert len(await server.reload.reload()) == 1
    assert "jwks unavailable" in [log["event"] for log in logs]
    server.token = server.issuer.mint(scope="gpu", jti="new")
    assert (await server.ask())[0] == 200


def public_pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


async def test_a_key_file_that_changed_is_read(
    start: OpenServer, tmp_path: Path, issuer: Issuer
) -> None:
    keys = tmp_path / "keys.pem"
    keys.write_bytes(public_pem(new_key()))
    server = await start(auth={"jwks_url": None, "key_files": [str(keys)]})
    assert (await server.ask())[0] == 401
    keys.write_bytes(public_pem(issuer._keys[issuer.kid]))
    assert await server.reload.reload() == []
    assert (await server.ask())[0] == 200
    keys.write_text("nonsense")
    assert (await server.refused()).keys() == {str(keys)}
    assert (await server.ask())[0] == 200


async def test_limits_are_changed(server: Server) -> None:
    server.write(server={"limits": {"statuses_per_minute": 10}})
    await server.reload.reload()
    answers = [(await server.ask("/v1/instances/none"))[0] for _ in range(11)]
    assert answers == [404] * 10 + [429]
    server.write(server={"limits": {"statuses_per_minute": None}, "max_body_bytes": 1024})
    await server.reload.reload()
    assert (await server.ask("/v1/instances/none"))[0] == 404
    order = {**ORDER, "instance_id": "a", "startup_script": "#" * 2000}
    assert (await server.ask("/v1/instances", json=order))[0] == 413
    server.write(server={"max_body_bytes": 4 * 2**20})
    await server.reload.reload()
    order["startup_script"] = "#" * 3 * 2**20
    body = BytesIO(json.dumps(order).encode())
    assert (await server.ask("/v1/instances", data=body))[0] == 409  # there is no image


async def test_the_log_level_is_changed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[str] = []
    monkeypatch.setattr(reload_module, "set_up_logging", lambda log: levels.append(log.level))
    server.write(log={"level": "debug"})
    assert await server.reload.reload() == ["log.level: info -> debug"]
    await server.reload.reload()
    assert levels == ["debug"]


async def test_a_defect_leaves_everything_as_it_was(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("hunter2")

    monkeypatch.setattr(reload_module, "changes", broken)
    with capture_logs() as logs, pytest.raises(GpudError) as caught:
        await server.reload.reload()
    assert caught.value.code is Code.INTERNAL
    failed = [log["event"] for log in logs if log["log_level"] == "error"]
    assert failed == ["the reload failed unexpectedly, nothing was changed"]
    assert (await server.ask())[0] == 200


async def test_who_goes_away_does_not_stop_a_reload(server: Server) -> None:
    server.set_price(7)
    asking = asyncio.create_task(server.reload.reload())
    await asyncio.sleep(0)
    asking.cancel()
    async with asyncio.timeout(5):
        while server.reload._under_way:
            await asyncio.sleep(0.001)
    prices = server.reload._in_force.config.offers[0].price_per_gpu_hour
    assert [float(price) for price in prices.values()] == [7]


async def test_a_reload_under_way_at_the_end_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = asyncio.Event()

    async def slow(_: object) -> None:
        await never.wait()

    monkeypatch.setattr(reload_module, "_certificate", slow)
    asking = asyncio.create_task(server.reload.reload())
    await asyncio.sleep(0.02)
    await server.reload.close()
    with pytest.raises(asyncio.CancelledError):
        await asking


# -- the operator's ways ---------------------------------------------------------------------------


async def test_the_operator_is_told_over_the_socket(server: Server) -> None:
    socket = server.config.admin_socket_path
    server.set_price(3)
    told = await asyncio.to_thread(adminclient.post, socket, "/reload")
    assert told == {"changed": ["offers[0].price_per_gpu_hour.on_demand: 1 -> 3"]}
    server.write(libvirt={"threads": 9})
    with pytest.raises(GpudError) as caught:
        await asyncio.to_thread(adminclient.post, socket, "/reload")
    assert "libvirt.threads: is 8, would be 9 (restart gpud to change it)" in str(caught.value)


async def test_sighup_reloads_and_systemd_is_told(
    tmp_path: Path, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("gpud.systemd.notify", told.append)
    async with aiohttp.ClientSession() as session:
        server = Server(tmp_path, issuer, session)
        reread = partial(load_config, server.file)
        task = asyncio.create_task(app.serve(server.config, reread, claim(server.config.state_dir)))

        async def until(count: int) -> None:
            async with asyncio.timeout(10):
                while len(told) < count:
                    await asyncio.sleep(0.005)

        await until(1)
        await add_image(server)
        await server.selling()
        server.set_price(4)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(3)
        assert [one["price_per_hour"] for one in await server.offerings()] == [4]
        server.file.write_text("auth: {")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(5)
        assert [one["price_per_hour"] for one in await server.offerings()] == [4]
        os.kill(os.getpid(), signal.SIGTERM)
        await task
    assert [re.sub(r"\d+", "N", one.split("\nSTATUS")[0]) for one in told] == [
        "READY=N", "RELOADING=N\nMONOTONIC_USEC=N", "READY=N",
        "RELOADING=N\nMONOTONIC_USEC=N", "READY=N", "STOPPING=N",
    ]  # fmt: skip


# -- certificates ----------------------------------------------------------------------------------


def as_settings(files: Any) -> dict[str, str]:
    return {name: str(path) for name, path in files.model_dump().items()}


def replace(old: Any, new: Any) -> None:
    """Put new files in the place of the old ones, as who renews does: the certificate first."""
    new.certificate_file.replace(old.certificate_file)
    new.key_file.replace(old.key_file)


async def shown(server: Server) -> bytes:
    """The certificate that a new caller is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = server.settings["server"]["port"]
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return found


async def test_renewed_certificate_files_are_taken_up(start: OpenServer, tmp_path: Path) -> None:
    tls = Tls(tmp_path)
    files = tls.write("server")
    server = await start(server={"tls": as_settings(files)})
    first = await shown(server)
    expiry = await server.metric("gpud_tls_certificate_expiry_timestamp_seconds")
    await server.reload.renew_certificate()
    assert await shown(server) == first

    renewed = tls.write("renewed", hours=99)
    certificate = renewed.certificate_file.read_bytes()
    files.certificate_file.write_bytes(certificate)  # the key is still on its way
    with capture_logs() as logs:
        await server.reload.renew_certificate()
        await server.reload.renew_certificate()
    assert [log["event"] for log in logs] == ["the renewed certificate cannot be used"]
    assert await shown(server) == first
    with pytest.raises(GpudError):
        await server.reload.reload()
    assert await shown(server) == first

    replace(files, renewed)
    with capture_logs() as logs:
        await server.reload.renew_certificate()
    assert [log["event"] for log in logs] == ["certificate renewed"]
    second = await shown(server)
    assert second == ssl.PEM_cert_to_DER_cert(certificate.decode())
    later = await server.metric("gpud_tls_certificate_expiry_timestamp_seconds")
    assert later - expiry == pytest.approx(98 * 3600, abs=60)

    replace(files, tls.write("third"))
    assert "server.tls: another certificate, valid until" in str(await server.reload.reload())
    assert await shown(server) != second


async def test_the_files_are_looked_at_by_themselves(
    start: OpenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload_module, "_LOOK_AT_CERTIFICATE_EVERY_S", 0.01)
    tls = Tls(tmp_path)
    files = tls.write("server")
    server = await start(server={"tls": as_settings(files)})
    first = await shown(server)
    replace(files, tls.write("renewed"))
    async with asyncio.timeout(10):
        while await shown(server) == first:
            await asyncio.sleep(0.005)
    files.certificate_file.unlink()
    await asyncio.sleep(0.03)
    assert await shown(server), "what was loaded stays in use"


async def test_tls_is_switched_on_and_off(server: Server, tmp_path: Path) -> None:
    await server.reload.renew_certificate()
    assert (await server.ask())[0] == 200
    server.write(server={"tls": as_settings(Tls(tmp_path).write("server"))})
    told = await server.reload.reload()
    assert [line.split(":")[0] for line in told] == [
        "server.tls.certificate_file", "server.tls.key_file", "server.tls",
    ]  # fmt: skip
    assert await shown(server)
    assert (await server.ask())[0] == 200, "over the connection that it had"
    server.write(server={"tls": None})
    await server.reload.reload()
    async with aiohttp.ClientSession() as server.session:
        assert (await server.ask())[0] == 200
