"""A libvirtd that a test may kill: one of an ordinary user, beside the host's."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import libvirt
import pytest

NOBODY = 65534


def wait_for_libvirt(uri: str, daemon: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert daemon.poll() is None, f"{daemon.args!r} has ended"
        try:
            libvirt.open(uri).close()
        except libvirt.libvirtError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"nobody answers on {uri}")


def end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    daemon.wait(20)


class PrivateDaemon:
    """A libvirtd of an ordinary user, which a test may kill."""

    def __init__(self, home: Path) -> None:
        config = home / "config" / "libvirt"
        config.mkdir(parents=True)
        (config / "qemu.conf").write_text('stdio_handler = "file"\n')
        self.uri = f"qemu:///session?socket={home}/run/libvirt/libvirt-sock"
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_CACHE_HOME": str(home / "cache"),
        }
        (home / "run").mkdir(mode=0o700)
        self._user = NOBODY if os.geteuid() == 0 else None
        if self._user is not None:
            for path in (home, *home.rglob("*")):
                os.chown(path, self._user, self._user)
        self.start()

    def start(self) -> None:
        user = self._user
        self.process = subprocess.Popen(
            ["libvirtd"],
            env=self._environment,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            stderr=subprocess.DEVNULL,
        )
        wait_for_libvirt(self.uri, self.process)

    @property
    def as_user(self) -> list[str]:
        """A command that runs another as the user whose guests this libvirtd runs."""
        if self._user is None:
            return []
        # It may read everything, since root's Python often lies in root's own directory.
        reading = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
        identity = [f"--reuid={self._user}", f"--regid={self._user}", "--clear-groups"]
        return ["setpriv", *identity, *reading]

    def own(self, path: Path) -> None:
        """Give a directory to that user."""
        if self._user is not None:
            os.chown(path, self._user, self._user)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it together with what a failed test has left running."""
        if self.process.poll() is not None:
            self.start()
        connection = libvirt.open(self.uri)
        for domain in connection.listAllDomains():
            domain.destroy()
        connection.close()
        end(self.process)
