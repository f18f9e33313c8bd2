"""The Debian package: built for real, then lived with in a Debian of its own, by apt.

What it depends on is there in name only, so that a small Debian will do
and apt needs no network.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

from gpud.cli import VERBS
from tests.machine import server

REPOSITORY = Path(__file__).parents[2]
SUITE = platform.freedesktop_os_release()["VERSION_CODENAME"]
"""A package fits the distribution that it was built on: it has that one's Python and libvirt."""

INCLUDED = "python3,systemd,udev,kmod,ca-certificates,init-system-helpers,libvirt0"
IN_NAME_ONLY = (
    "libvirt-daemon-system (= 99)", "libvirt-daemon-driver-qemu", "qemu-system-x86", "qemu-utils",
    "ovmf", "dnsmasq-base", "iptables", "e2fsprogs", "fdisk", "mtools",
)  # fmt: skip
GUEST = "i-0123456789abcdef"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can enter another root")


class Debian:
    """A Debian in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, script: str, *, fails: bool = False) -> str:
        """Run a shell script in it, with a process table of its own; what it printed."""
        enter = (
            'mount --make-rprivate / && mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev"'
            ' && exec chroot "$0" /bin/bash -euc "$1"'
        )
        unshare = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "sh",
            "-euc",
            enter,
            str(self.root),
            script,
        ]
        done = subprocess.run(
            unshare,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,  # nobody is there to be asked
            text=True,
            check=False,
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "DEBIAN_FRONTEND": "noninteractive",
            },
        )
        assert (done.returncode != 0) is fails, done.stdout
        return done.stdout

    def holds(self, path: str) -> bool:
        return os.path.lexists(self.root / path)  # a link there means something in that root only


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built once for all of pytest's processes."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "package"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(place.glob("*.deb")):
            run(REPOSITORY / "systemd/deb/build.sh", place, DPKG_DEB_COMPRESSOR_TYPE="none")
    (built,) = place.glob("*.deb")
    return built


@pytest.fixture
def debian(tmp_path: Path) -> Debian:
    """A fresh Debian, unpacked from one that is made once for a machine."""
    tar = server.test_image().with_name(f"{SUITE}-package-1.tar")
    if not tar.exists():
        part = tar.with_suffix(f".{os.getpid()}.part.tar")
        run(
            "mmdebstrap", "--quiet", "--variant=apt", f"--include={INCLUDED}",
            '--aptopt=APT::Install-Recommends "false"', "--dpkgopt=force-unsafe-io", SUITE, part,
        )  # fmt: skip
        part.rename(tar)
    root = tmp_path / "debian"
    root.mkdir()
    run("tar", "--extract", f"--file={tar}", f"--directory={root}", "--exclude=./dev/*")
    debian = Debian(root)
    control = (
        "Package: in-name-only\nVersion: 1\nArchitecture: all\nMaintainer: nobody\n"
        f"Provides: {', '.join(IN_NAME_ONLY)}\nDescription: stands for packages\n"
    )
    repack(
        root / "in-name-only",
        control,
        root / "tmp/in-name-only.deb",
    )
    debian.run("dpkg --install /tmp/in-name-only.deb")
    return debian


def test_the_life_of_the_package(package: Path, debian: Debian) -> None:
    first, second = versions(package, debian)

    # A fresh server: everything is there, and what is not filled in is named.
    installed = debian.run(f"apt-get install --yes {first}")
    assert "fill in /etc/gpud/gpud.yaml" in installed
    assert "libvirt" in debian.run("id --groups --name gpud")
    assert debian.run("stat -c '%a %U %G' /etc/gpud /etc/gpud/gpud.yaml /var/lib/gpud") == (
        "750 root gpud\n640 root gpud\n711 gpud gpud\n"
    )
    assert debian.holds("etc/systemd/system/multi-user.target.wants/gpud.service")
    told = debian.run("gpud config check", fails=True)
    for key in (
        "auth.issuer",
        "auth.audience",
        "site.region",
        "site.datacenter_location",
        "offers",
    ):
        assert f"{key}: not filled in" in told
    assert debian.run("gpud serve || echo $?").endswith(f"{told}{os.EX_CONFIG}\n")
    assert debian.run("cd / && runuser -u gpud gpud openapi").startswith("openapi: 3.0.3")

    # It is complete, with byte code, and has nothing of pip or of where it was built.
    (packages,) = (debian.root / "usr/lib/gpud/lib").glob("python3.*/site-packages")
    assert not {"pip", "setuptools", "wheel"} & {one.name for one in packages.iterdir()}
    assert len(list(packages.glob("gpud/__pycache__/app.*.pyc"))) == 1
    assert debian.run(rf"grep -rlE 'gpud-install\.|{REPOSITORY}' /usr/lib/gpud || true") == ""
    debian.run(
        "/usr/lib/gpud/bin/python3 -Ic 'import pynvml, libvirt; from importlib.resources import files;"
        ' assert files("gpud.data").joinpath("cloud-init/boot.sh").is_file()\''
    )
    completed = debian.run(
        "source /usr/share/bash-completion/completions/gpud; COMP_WORDS=(gpud conf) COMP_CWORD=1;"
        " complete -p gpud >/dev/null; _gpud_completion gpud; echo ${COMPREPLY[*]}"
    )
    assert completed == "config\n"

    # An upgrade asks nothing and keeps what is the operator's.
    config = debian.root / "etc/gpud/gpud.yaml"
    config.write_text("# mine\n")
    debian.run("touch /var/lib/gpud/state.sqlite; chown gpud /var/lib/gpud/state.sqlite")
    assert "fill in" not in debian.run(f"apt-get install --yes {second}")
    assert debian.run("dpkg-query -W -f '${Version}' gpud") == "999"
    assert config.read_text() == "# mine\n"

    # Removed, it leaves the operator's; purged, nothing, but not under guests.
    debian.run("apt-get remove --yes gpud")
    assert not debian.holds("usr/lib/gpud")
    assert not debian.holds("usr/bin/gpud")
    assert config.read_text() == "# mine\n"
    assert debian.holds("var/lib/gpud/state.sqlite")
    disk = f"/var/lib/gpud/instances/{GUEST}/disk.qcow2"
    qemu = f"cp /bin/sleep /tmp/qemu-system-x86_64; (exec -a {disk} /tmp/qemu-system-x86_64 60) & "
    refused = debian.run(f"{qemu} sleep 1; dpkg --purge gpud", fails=True)
    assert GUEST in refused
    assert "virsh destroy" in refused
    assert debian.holds("var/lib/gpud/state.sqlite")
    debian.run("dpkg --purge gpud")
    assert not debian.holds("var/lib/gpud")
    assert not debian.holds("etc/gpud")
    assert not debian.holds("etc/systemd/system/multi-user.target.wants/gpud.service")
    assert debian.run("dpkg --list gpud 2>&1 || true").count("no packages found") == 1


def test_the_manual_is_sound_and_names_every_verb(package: Path, tmp_path: Path) -> None:
    run("dpkg-deb", "--extract", package, tmp_path)
    pages = sorted((tmp_path / "usr/share/man").rglob("*.gz"))
    assert [page.name for page in pages] == ["gpud.1.gz", "gpud.yaml.5.gz"]
    for page in pages:
        text = tmp_path / page.stem
        text.write_bytes(subprocess.check_output(["gzip", "--decompress", "--stdout", page]))
        linted = subprocess.run(
            ["mandoc", "-Tlint", "-Wwarning", text], capture_output=True, text=True, check=False
        )
        assert (linted.returncode, linted.stdout) == (0, "")
    shown = run("man", "--local-file", "--warnings", pages[0], MANWIDTH="100", LC_ALL="C.UTF-8")
    for verb in VERBS:
        assert re.search(rf"^ +{verb}\b", shown, re.MULTILINE), verb


def test_installed_without_a_package_and_uninstalled_nothing_is_left(tmp_path: Path) -> None:
    run(REPOSITORY / "systemd/install.sh", "/usr/bin/python3", "/usr/local", tmp_path)
    local = tmp_path / "usr/local"
    unit = (local / "lib/systemd/system/gpud.service").read_text()
    assert "ExecStart=/usr/local/bin/gpud serve" in unit
    assert (
        (local / "lib/gpud/bin/gpud")
        .read_text()
        .startswith("#!/usr/local/lib/gpud/bin/python3 -I\n")
    )
    (local / "lib/other").touch()
    run(REPOSITORY / "systemd/uninstall.sh", "/usr/local", tmp_path)
    left = [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert left == [local / "lib/other"]


def versions(package: Path, debian: Debian) -> tuple[str, str]:
    """The package and a newer one, where ``debian`` sees them."""
    tmp = debian.root / "tmp"
    (tmp / "gpud-1.deb").write_bytes(package.read_bytes())
    run("dpkg-deb", "--raw-extract", package, tmp / "unpacked")
    control = (tmp / "unpacked/DEBIAN/control").read_text()
    newer = re.sub("^Version: .*", "Version: 999", control, flags=re.MULTILINE)
    repack(tmp / "unpacked", newer, tmp / "gpud-2.deb")
    return "/tmp/gpud-1.deb", "/tmp/gpud-2.deb"


def repack(tree: Path, control: str, package: Path) -> None:
    """Make a package of a directory, quickly."""
    (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
    (tree / "DEBIAN/control").write_text(control)
    run("dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, package)


def run(*words: str | Path, **env: str) -> str:
    """Run a program that must end well; what it printed."""
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
