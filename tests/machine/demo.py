"""``make demo``: GPU.ai orders an instance from a real gpud, logs in, and gives it back.

Everything is real but the GPUs, which are emulated PCI devices: tokens, libvirt, QEMU, the guest's
cloud-init, its reverse SSH tunnel, and the login through it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.machine.gpu_ai import GpuAi, TunnelEnd, default_state, gpu_ai
from tests.machine.processes import free_port
from tests.machine.server import GpudServer, test_image

BOOT_TIMEOUT_S = 600
EDU_DEVICE = "1234:11e8"
LOOK_AROUND = """\
echo "hostname:  $(hostname)"
echo "kernel:    $(uname -r), up $(cut -d. -f1 /proc/uptime) s"
echo "memory:    $(free -m | awk '/^Mem/ {print $2}') MiB, cores: $(nproc)"
echo "disk:      $(df -h --output=size / | tail -1 | tr -d ' ')"
lspci -n | grep 1234:11e8 | sed 's/^/stand-in:  /'
sudo journalctl -q -u gpud-script -o cat | grep 'startup script' | sed 's/^/script:    /'
"""


class Demo:
    """The play, one act after another."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.act = "starting"
        self.upstream_id = ""
        self.server = GpudServer(default_state("gpud-demo"))
        self.tunnel = TunnelEnd(self.server.state_dir / "gpu-ai")
        self.tunnel_port = free_port()

    async def play(self, *, keep: bool) -> None:
        await self.open()
        try:
            async with gpu_ai(self.server.url, self.server.issuer_url) as caller:
                await self.order(caller)
                await self.log_in()
                if keep:
                    self.say_how_to_go_on(caller.token)
                    return
                await self.give_back(caller)
        except Exception:
            await self.explain()
            raise
        finally:
            if not keep:
                self.close()

    async def open(self) -> None:
        with self.acting("start GPU.ai's token endpoint and tunnel end, and gpud"):
            await self.clear_away_earlier_demo()
            self.server.state_dir.mkdir(parents=True, exist_ok=True)
            self.server.state_dir.chmod(0o711)
            await self.tunnel.start()
            await self.server.start(test_image())
            programs = (self.server.daemon, self.server.issuer, self.tunnel.sshd)
            self.pid_file.write_text(" ".join(str(program.pid) for program in programs))

    async def order(self, caller: GpuAi) -> None:
        with self.acting("poll the offerings"):
            for one in await caller.wait_for_offerings():
                self.show(f"{one['available_count']} x {one['gpu_type']} x{one['gpu_count']}, "
                          f"{one['tier']}, {one['price_per_hour']:.2f} USD/h")  # fmt: skip
        with self.acting("order one GPU"):
            accepted = await caller.order(
                instance_id=str(uuid.uuid4()),
                gpu_type="h100_sxm",
                gpu_count=1,
                tier="on_demand",
                ssh_public_keys=[self.tunnel.customer_public_key],
                startup_script=self.tunnel.startup_script(self.tunnel_port),
            )
            self.upstream_id = accepted["upstream_id"]
            self.show(f"{accepted['upstream_id']}, {accepted['cost_per_hour']} USD/h, ready in "
                      f"about {accepted['estimated_ready_seconds']} s")  # fmt: skip
        with self.acting("wait until it is running"):
            await caller.wait_for(self.upstream_id, "running", BOOT_TIMEOUT_S, self.show)

    async def log_in(self) -> None:
        with self.acting("log in with the ordered key, through the tunnel the guest has opened"):
            user = self.server.config.get("guest", {}).get("login_user", "ubuntu")
            seen = await self.tunnel.log_in(self.tunnel_port, user, LOOK_AROUND)
            for line in seen.splitlines():
                self.show(line)
            for wanted in (self.upstream_id, "disk:      5.", EDU_DEVICE, "startup script: pid"):
                assert wanted in seen, f"the guest does not show {wanted}"

    async def give_back(self, caller: GpuAi) -> None:
        with self.acting("delete the order and wait until it is terminated"):
            await caller.delete(self.upstream_id)
            await caller.wait_for(self.upstream_id, "terminated", 60, self.show)
        with self.acting("see that nothing is left"):
            domains = [name for name in await self.server.domains() if self.upstream_id in name]
            files = self.server.leftovers()
            instances = await self.server.gpud("instances", "--json")
            available = max(one["available_count"] for one in await caller.offerings())
            self.show(f"domains {domains}, files {files}, instances {instances.strip()}, "
                      f"{available} GPUs for sale again")  # fmt: skip
            assert not domains
            assert not files
            assert instances.strip() == "[]"
            assert available == 2

    def say_how_to_go_on(self, token: str) -> None:
        url, auth = self.server.url, '-H "Authorization: Bearer $TOKEN"'
        login = " ".join(self.tunnel.login_command(self.tunnel_port, "ubuntu"))
        pids = self.pid_file.read_text()
        print(f"""
All of it is left running. The token is good for an hour.

  TOKEN={token}
  curl {auth} {url}/v1/gpu/available
  curl {auth} {url}/v1/instances/{self.upstream_id}
  curl {auth} -X DELETE {url}/v1/instances/{self.upstream_id}
  {login}

Delete the instance first; then end the programs: kill {pids}
""")

    @property
    def pid_file(self) -> Path:
        return self.server.state_dir / "demo.pids"

    async def clear_away_earlier_demo(self) -> None:
        """End and remove what `make demo KEEP=1`, or a demo that was killed, has left; only that."""
        if self.pid_file.exists():
            for pid in map(int, self.pid_file.read_text().split()):
                with suppress(OSError):
                    if "gpud" in Path(f"/proc/{pid}/cmdline").read_text():
                        os.kill(pid, signal.SIGTERM)
            await asyncio.sleep(2)
        await self.server.remove_domains()
        self.server.erase()

    def close(self) -> None:
        self.server.stop()
        self.tunnel.sshd.stop()
        self.pid_file.unlink(missing_ok=True)

    async def explain(self) -> None:
        """After a failure: the guest's console and the daemon's log."""
        if self.upstream_id and self.server.daemon.running:
            with suppress(AssertionError):
                console = await self.server.gpud("console", self.upstream_id)
                print("\n".join(["--- the guest's console ends with", *console.splitlines()[-30:]]))
        if self.server.daemon.log.exists():
            print(f"--- the daemon's log ends with\n{self.server.daemon.tail()}")

    @contextmanager
    def acting(self, act: str) -> Iterator[None]:
        self.act = act
        began = time.monotonic()
        print(f"{began - self.began:6.1f} s  {act}", flush=True)
        yield

    def show(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s      {line}", flush=True)


async def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo")
    parser.add_argument("--keep", action="store_true", help="leave everything running")
    keep: bool = parser.parse_args().keep
    demo = Demo()
    try:
        await demo.play(keep=keep)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told where it happened
        print(f"demo: failed at: {demo.act}: {error}")
        return 1
    print(f"demo: ok, {time.monotonic() - demo.began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
