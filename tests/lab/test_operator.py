"""An operator's server, from a bare Debian to sales and back, by the package and its own words alone.

What the operator brings along is small: apt, systemctl, an editor, a reboot. The rest he is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest
import yaml
from yarl import URL

from gpud.dev.issuer import INTROSPECTION_PATH
from tests.lab.hardware import FOR_SALE, FOREIGN
from tests.lab.images import NEXT_PACKAGE, NEXT_VERSION, PACKAGE
from tests.lab.lab import Lab, scenario, script
from tests.lab.machine import IOMMU_OFF, GpuServer
from tests.machine.gpu_ai import CLIENT_ID, CLIENT_SECRET
from tests.machine.prometheus import Prometheus

pytestmark = pytest.mark.asyncio(loop_scope="session")

Step = Callable[[str], AbstractAsyncContextManager[None]]

APT = "DEBIAN_FRONTEND=noninteractive apt-get --yes --no-install-recommends"
EXPOSURE = 2.0
CONFIG = "/etc/gpud/gpud.yaml"
MAIN_PID = "systemctl show --value -p MainPID gpud"
DROP_INS = "/etc/systemd/system/gpud.service.d"
TO_FILL_IN = ("auth.issuer", "auth.audience", "site.region", "site.datacenter_location", "offers")


async def faults(server: GpuServer) -> dict[str, str]:
    """What must be mended, and how, as `gpud doctor` has it."""
    told = json.loads(await server.run("gpud doctor --json || [ $? -le 2 ]", timeout_s=180))
    found = [one for one in told["verdicts"] if one["level"] == "fault"]
    return {f"{one['name']}: {one['what']}": one["mend"] for one in found}


async def service(server: GpuServer, wanted: str) -> dict[str, str]:
    """What systemd says of the service, once it is in that state."""
    shown = await server.run(
        f"timeout 60 sh -c 'until [ $(systemctl is-active gpud) = {wanted} ]; do sleep 1; done';"
        " systemctl show gpud -p NRestarts,ExecMainStatus,User,WatchdogUSec",
        timeout_s=90,
    )
    return dict(line.split("=", 1) for line in shown.splitlines())


async def secret_from_systemd(lab: Lab) -> None:
    """Tokens are judged by asking their issuer, with a secret that only root and systemd can read."""
    server = lab.server
    config = yaml.safe_load(await server.run(f"cat {CONFIG}"))
    url = URL(lab.issuer_url)
    del config["auth"]["key_files"]
    config["auth"]["introspection"] = {
        "url": f"{url}{INTROSPECTION_PATH}",
        "client_id": CLIENT_ID,
        "client_secret": {"credential": "introspection"},
    }
    await server.let_reach(int(url.port or 0))
    await server.write("/root/introspection.secret", CLIENT_SECRET)
    await server.run(f"chmod 0600 /root/introspection.secret; mkdir -p {DROP_INS}")
    credential = "LoadCredential=introspection:/root/introspection.secret"
    await server.write(f"{DROP_INS}/secret.conf", f"[Service]\n{credential}")
    kept = await server.run(f"cat {CONFIG}")
    await server.write(CONFIG, yaml.safe_dump(config))
    await server.run("systemctl daemon-reload && systemctl restart gpud", timeout_s=120)
    await service(server, "active")
    assert await lab.caller.offerings() == []
    good, lab.caller.token = lab.caller.token, "nobody's"
    assert (await lab.caller.call("GET", "/v1/gpu/available"))[0] == 401
    lab.caller.token = good
    written = await server.run(f"journalctl -u gpud; cat /proc/$({MAIN_PID})/environ")
    assert CLIENT_SECRET not in written
    # The way back needs no restart.
    await server.write(CONFIG, kept)
    await server.run("systemctl reload gpud", timeout_s=60)
    assert await lab.caller.offerings() == []
    await server.run(f"rm -r /root/introspection.secret {DROP_INS} && systemctl daemon-reload")


async def reloaded(server: GpuServer) -> None:
    """`systemctl reload` changes a price in the same process, and says why it refuses another."""
    price = "gpud offers --json | grep price_per_hour"
    before = await server.run(MAIN_PID)
    await server.run(f"sed -i 's/on_demand: .*/on_demand: 0.75/' {CONFIG}")
    await server.run("systemctl reload gpud", timeout_s=60)
    assert "0.75" in await server.run(price)
    await server.run(f"sed -i 's/on_demand: .*/on_demand: -1/' {CONFIG}")
    refused = await server.run(
        "systemctl reload gpud && exit 1; systemctl status --lines 30 gpud", timeout_s=60
    )
    assert "offers[0].price_per_gpu_hour.on_demand" in refused
    assert "0.75" in await server.run(price)
    assert await server.run(MAIN_PID) == before
    await server.run(f"sed -i 's/on_demand: .*/on_demand: 0.69/' {CONFIG}")
    await server.run("systemctl reload gpud", timeout_s=60)


@scenario
async def test_an_operators_server(bare: Lab, step: Step) -> None:
    """An operator's server: installed, mended, sold, watched, drained, upgraded, removed."""
    lab, server = bare, bare.server
    by_somebody = f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {IOMMU_OFF}"'
    await server.run("mkdir -p /etc/default/grub.d")
    await server.write("/etc/default/grub.d/somebody.cfg", by_somebody)

    async with step("the package is installed; the service names what is to be filled in"):
        await server.run("cp /payload/70-gpud-local.rules /etc/udev/rules.d/70-cards.rules")
        told = await server.run(f"{APT} install /payload/{PACKAGE} 2>&1", timeout_s=300)
        assert "fill in /etc/gpud/gpud.yaml" in told
        state = await service(server, "failed")
        assert state["ExecMainStatus"] == "78"
        assert state["NRestarts"] == "0"
        log = await server.run("systemctl status --lines 30 gpud || true")
        assert [key for key in TO_FILL_IN if f"{key}: not filled in" not in log] == []

    async with step("filled in, it serves, unprivileged and in its sandbox"):
        await server.run(
            "install -m 0640 -g gpud /payload/gpud.yaml /payload/issuer.jwks /etc/gpud/"
        )
        await server.run("gpud config check && systemctl restart gpud", timeout_s=120)
        state = await service(server, "active")
        assert state["User"] == "gpud"
        assert await lab.caller.offerings() == []
        security = await server.run("systemd-analyze security --no-pager gpud", timeout_s=120)
        overall = re.search(r"Overall exposure level for gpud\.service: ([0-9.]+)", security)
        assert overall is not None
        assert float(overall[1]) <= EXPOSURE

    async with step(
        "a secret comes from systemd; a reload takes a good configuration, and no bad one"
    ):
        await secret_from_systemd(lab)
        await reloaded(server)

    async with step("doctor's words are followed: setup, a reboot, an image"):
        await server.run(
            "virsh domcapabilities --virttype kvm", timeout_s=120
        )  # slow the first time
        found = await faults(server)
        assert "gpud setup" in found["IOMMU: the IOMMU is off"]
        planned = await server.run("gpud setup --dry-run || [ $? -le 3 ]", timeout_s=180)
        assert f"Linux was booted with {IOMMU_OFF}" in planned
        look = re.search(r"boot loader's configuration \((grep -rn iommu [^)]*)\), run", planned)
        assert look is not None, planned
        seen = await server.run(f"{look[1]} 2>/dev/null || true")
        await server.run(f"rm {seen.partition(':')[0]}")
        assert "boot Linux with iommu=pt" in planned
        made = await server.run("gpud setup --yes || [ $? = 3 ] || [ $? = 1 ]", timeout_s=300)
        assert "reboot" in made
        await server.reboot()
        assert "iommu=pt" in await server.run("cat /proc/cmdline")
        await server.run("mount -o ro /dev/vdb /payload")
        await service(server, "active")
        found = await faults(server)
        (mend,) = (mend for one, mend in found.items() if one.startswith("guest.image"))
        add = re.search(r"runuser -u gpud -- gpud image add FILE --name \w+", mend)
        assert add is not None, mend
        # Unsealed: the lab's small guest is no whole system.
        await server.run(
            f"{add[0].replace('FILE', '/payload/small.raw')} --unsealed", timeout_s=300
        )
        # What is left, another slot would mend.
        assert all(FOREIGN in one for one in await faults(server))
        await lab.offered(len(FOR_SALE))

    prometheus = Prometheus(server.directory, f"127.0.0.1:{server.metrics_port}")
    prometheus.program.start()
    try:
        async with step("an order is filled, and Prometheus shows it"):
            await prometheus.ready()
            upstream_id = await lab.order(script())
            await lab.running(upstream_id)
            await prometheus.until('gpud_instances{status="running"}', 1)
            await prometheus.until('sum(gpud_gpus{state="in_use"})', 1)
            screen = await lab.command("status")
            assert upstream_id in screen

        async with step("drained: nothing is sold, what runs stays"):
            await lab.command("drain", "--all")
            await lab.offered(0)
            status, _ = await lab.try_order(script())
            assert status == 409
            assert (await lab.caller.show(upstream_id))["status"] == "running"

        async with step("upgraded under the guest, which does not notice"):
            await server.run(f"{APT} install /payload/{NEXT_PACKAGE}", timeout_s=300)
            await service(server, "active")
            await lab.back()
            assert NEXT_VERSION in await server.run("dpkg-query -W -f '${Version}' gpud")
            assert (await lab.caller.show(upstream_id))["status"] == "running"
            assert (await lab.instance(upstream_id))["restarts"] == 0
            await lab.offered(0)  # it is still drained
            await lab.command("check")
            await prometheus.until('gpud_instances{status="running"}', 1)
    finally:
        prometheus.program.stop()

    async with step("removed: the guest runs on, and is still there when gpud comes back"):
        guests = "pgrep --count --full [g]uest=gpud-"
        before = await server.run(guests)
        await server.run(f"{APT} remove gpud", timeout_s=300)
        assert await server.run(guests) == before
        assert await server.run("test -e /usr/bin/gpud || echo gone") == "gone\n"
        refused = await server.run(f"{APT} purge gpud 2>&1 && false || true", timeout_s=300)
        assert upstream_id in refused
        await server.run(f"{APT} install /payload/{NEXT_PACKAGE}", timeout_s=300)
        await service(server, "active")
        await lab.back()
        assert (await lab.caller.show(upstream_id))["status"] == "running"

    async with step("the order ends; setup is undone; purged, nothing is left"):
        await lab.delete(upstream_id)
        await lab.command("undrain", "--all")
        await lab.offered(len(FOR_SALE))
        undone = await server.run("gpud setup --undo --yes || [ $? = 3 ]", timeout_s=300)
        assert "reboot" in undone
        assert "iommu=pt" not in await server.run("cat /boot/grub/grub.cfg")
        await server.run(f"{APT} purge gpud", timeout_s=300)
        left = "find / -xdev -path /var/log/libvirt -prune -o -iname '*gpud*' -print"
        assert await server.run(left, timeout_s=120) == ""
        assert await server.run("virsh --quiet net-list --all --name") == "default\n"
