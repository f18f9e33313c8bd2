"""Every command of the documents is typed, at a real gpud with a running guest, and does what they show.

What cannot be typed here is named in ELSEWHERE, with the test that does it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gpud.model import UPSTREAM_ID
from tests.documents import ELLIPSIS, PAGES, ROOT, Command, commands_of
from tests.machine.conftest import ServerFactory
from tests.machine.gpu_ai import GpuAi
from tests.machine.prompt import Prompt
from tests.machine.server import GpudServer
from tests.machine.server import test_image as guest_image
from tests.machine.small_guest import small_guest

BOOT_TIMEOUT_S = 120
INSTANCE: Final = "i-0123456789abcdef"
CARDS: Final = ("0000:36:00.0", "0000:46:00.0", "0000:56:00.0", "0000:98:00.0")
ORDER: Final = {"gpu_type": "h100_sxm", "gpu_count": 1, "tier": "on_demand"}
SCRIPT: Final = 'echo "hello from the startup script"\nexit 7\n'

IN_TURN: Final = sorted(
    PAGES, key=lambda page: (page != ROOT / "docs/operations.md", page == ROOT / "README.md")
)
"""The one that shows what a guest prints is first, the one that names another image `base` is last."""

HERE: Final = re.compile(
    r"gpud (?!setup|serve|dev)|gpud setup --dry-run|curl |sed -i '[^']*' /etc/gpud/gpud\.yaml$"
)
"""How a command begins that is typed here, where it is root who types: nothing else is."""

SERVICE: Final = {
    "systemctl stop gpud": ("stop",),
    "systemctl start gpud": ("start",),
    "systemctl restart gpud": ("stop", "start"),
}
"""What systemd would do to the daemon, and is done to this one, which it has not started."""

LAB: Final = "tests/lab/test_operator.py"
ELSEWHERE: Final = (
    # What is typed, the file that does it, and the words by which it is known there.
    (r"make (demo|test|lab|golden|bench)\b.*", "Makefile", ("{0}: setup",)),
    (r"make deb\b.*", "tests/machine/test_package.py", ("systemd/deb/build.sh",)),
    (r"make install", "tests/machine/test_package.py", ("systemd/install.sh",)),
    (r"make uninstall", "tests/machine/test_package.py", ("systemd/uninstall.sh",)),
    (r"apt (install) \./dist/gpud_\*\.deb", LAB, ("{APT} {0}",)),
    (r"apt (remove|purge) gpud", LAB, ("{APT} {0} gpud",)),
    (r"editor /etc/gpud/gpud\.yaml", LAB, ("/etc/gpud/",)),
    (r"reboot", LAB, ("server.reboot()",)),
    (r"gpud gpus confirm .*", "tests/unit/test_cli.py", ('"gpus", "confirm"',)),
    (r"gpud setup( --undo)?", LAB, ("gpud setup{0} --yes",)),
    (r"systemctl status gpud", LAB, ("systemctl status",)),
    (r"journalctl -u gpud\b.*", "tests/lab/lab.py", ("journalctl -u gpud",)),
    (
        r"gpud serve --config /etc/gpud/gpud\.yaml",
        "tests/machine/server.py",
        ('"serve", "--config"',),
    ),
    (
        r"cloud-init/golden/build\.sh .*",
        "tests/machine/test_golden.py",
        ("cloud-init/golden/build.sh",),
    ),
)

STATUSES: Final = {
    "gpud doctor": {0, 1, 2},
    "gpud setup --dry-run": {0, 1, 3},
    "gpud image check": {0, 1},
}
"""Of commands that judge this very machine: any that is not a failure of theirs."""

OF_ANOTHER_SERVER: Final = "gpud setup --dry-run"
"""What is shown of it is from a server with real cards and an IOMMU that is off."""

OF_THE_ADMINISTRATOR: Final = re.compile(r"^(sudo |runuser -u gpud -- )")


class Stage:
    """A gpud, and what the documents' names stand for."""

    def __init__(self, server: GpudServer, caller: GpuAi, public_key: str) -> None:
        self.server = server
        self.caller = caller
        self.upstream_id = ""
        self.directory = server.state_dir / "typed"
        self.directory.mkdir()
        self.prompt = Prompt(self.directory, {**server.env, "TOKEN": caller.token})
        self._public_key = public_key
        (self.directory / "ubuntu.qcow2").symlink_to(guest_image())

    def names(self) -> dict[str, str]:
        """What stands in the documents for what is here; the longer of two that begin alike first."""
        config = self.server.config
        return {
            "https://gpu.example.com:8443": self.server.url,
            "https://auth.example.com/.well-known/jwks.json": config["auth"]["jwks_url"],
            "/usr/lib/gpud/minimal.yaml": str(ROOT / "config/minimal.yaml"),
            "/etc/gpud/gpud.yaml": str(self.server.config_file),
            "/var/backups": str(self.directory),
            "/var/lib/gpud": str(self.server.state_dir),
            "localhost:9487": f"localhost:{config['metrics']['port']}",
            "ssh-ed25519 AAAA… me": self._public_key,
            INSTANCE: self.upstream_id,
            **{card: f"ffffffff:{number:02x}:00.0" for number, card in enumerate(CARDS)},
        }

    def here(self, text: str) -> str:
        """A command as it is typed here."""
        typed = replaced(OF_THE_ADMINISTRATOR.sub("", text), self.names())
        typed = typed.replace("4f1c…", str(uuid.uuid4()))
        if "--sha256 …" in typed:
            digest = hashlib.sha256(guest_image().read_bytes()).hexdigest()
            typed = typed.replace("--sha256 …", f"--sha256 {digest}")
        return typed

    def as_documented(self, output: str) -> str:
        """What was printed here, in the documents' names."""
        return replaced(output, {here: name for name, here in self.names().items() if here})

    async def run(self, command: Command) -> str:
        """Do what a command says; what it printed.

        Raises:
            AssertionError: It ended otherwise than is documented.
        """
        assert command.text in SERVICE or HERE.match(OF_THE_ADMINISTRATOR.sub("", command.text))
        if command.text in SERVICE:
            for act in SERVICE[command.text]:
                await (self._stop() if act == "stop" else self.server.start_daemon())
            return ""
        status, output = self.prompt.run(self.here(command.text))
        expected = next(
            (found for start, found in STATUSES.items() if start in command.text), {command.status}
        )
        assert status in expected, f"{command}\nended with {status}:\n{output}"
        if orders(command) and (found := UPSTREAM_ID.search(output)):
            self.upstream_id = found[0]
        return self.as_documented(output)

    async def with_an_instance(self) -> None:
        """Order one where the last has ended, for the next page."""
        if self.upstream_id:
            if (await self.caller.show(self.upstream_id))["status"] in {"creating", "running"}:
                return
            await self.caller.wait_for(self.upstream_id, "terminated", 30)
        accepted = await self.caller.order(
            instance_id=str(uuid.uuid4()), startup_script=SCRIPT, **ORDER
        )
        self.upstream_id = accepted["upstream_id"]

    async def printed(self, text: str) -> None:
        """Wait until the guest has printed something."""
        log = self.server.state_dir / "console" / f"{self.upstream_id}.log"
        async with asyncio.timeout(BOOT_TIMEOUT_S):
            while not log.exists() or text not in log.read_text(errors="replace"):
                await asyncio.sleep(0.1)

    async def _stop(self) -> None:
        await asyncio.to_thread(self.server.daemon.stop)


@pytest.fixture
async def stage(start_server: ServerFactory) -> AsyncIterator[Stage]:
    server, caller = await start_server(
        await small_guest(), guest={"image": "base", "firmware": "bios"},
        gpus={"stand_ins": [{"gpu_type": "h100_sxm", "count": len(CARDS)}]},
    )  # fmt: skip
    stage = Stage(server, caller, public_key())
    try:
        yield stage
    finally:
        stage.prompt.close()


def public_key() -> str:
    """An OpenSSH key of nobody's."""
    key = Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


async def test_every_command_of_the_documents_does_what_they_show(stage: Stage) -> None:
    await stage.with_an_instance()
    await stage.caller.wait_for(stage.upstream_id, "running", BOOT_TIMEOUT_S)
    await stage.printed("script ended")
    for page in IN_TURN:
        commands = list(commands_of(page))
        if any(INSTANCE in one.text for one in commands) and not any(map(orders, commands)):
            await stage.with_an_instance()
        for command in commands:
            if elsewhere(command) is not None:
                continue
            output = await stage.run(command)
            undocumented_refusal = '"request_id"' in output and not any(
                "request_id" in line for line in command.output
            )
            assert not undocumented_refusal, f"{command}\nwas refused:\n{output}"
            missing = not_in(output, command)
            assert missing is None, f"{command}\nshows {missing!r}, and this came:\n{output}"


def test_what_is_not_typed_here_is_done_elsewhere() -> None:
    left = {row[0] for row in ELSEWHERE}
    for command in (one for page in PAGES for one in commands_of(page)):
        if (found := elsewhere(command)) is not None:
            pattern, file, words = found
            left.discard(pattern)
            text = (ROOT / file).read_text()
            for word in words:
                assert word in text, f"{command}\n{file} does not do it: no {word!r}"
    assert not left, "no document has these any more"


def test_every_command_has_its_place() -> None:
    for command in (one for page in PAGES for one in commands_of(page)):
        typed = OF_THE_ADMINISTRATOR.sub("", command.text)
        here = typed in SERVICE or HERE.match(typed)
        assert here or elsewhere(command), (
            f"{command}\nis neither typed here nor named in ELSEWHERE"
        )


def orders(command: Command) -> bool:
    """Whether a command is an order of its own."""
    return "/v1/instances -d" in command.text


def elsewhere(command: Command) -> tuple[str, str, tuple[str, ...]] | None:
    """The pattern, the file and the words of a command that is not typed here."""
    typed = OF_THE_ADMINISTRATOR.sub("", command.text.partition("  #")[0].rstrip())
    for pattern, file, words in ELSEWHERE:
        if found := re.fullmatch(pattern, typed):
            part = (found.groups() or ("",))[0] or ""
            return pattern, file, tuple(word.replace("{0}", part) for word in words)
    return None


def not_in(output: str, command: Command) -> str | None:
    """A line that is shown, and that nothing like it was printed; None where there is none.

    Of JSON every line counts, of everything else the first.
    """
    printed = {shape(line) for line in output.splitlines()}
    shown = [line for line in command.output if line != ELLIPSIS]
    if OF_ANOTHER_SERVER in command.text:
        return None
    if "| jq" not in command.text:
        shown = shown[:1]
    return next((line for line in shown if shape(line) not in printed), None)


def shape(line: str) -> tuple[str, ...]:
    """A line without what differs from run to run: of JSON its keys, else words without digits."""
    if keys := re.findall(r'"(\w+)":', line):
        return tuple(keys)
    words = line.rstrip(f" {ELLIPSIS}").split()
    return tuple("#" if any(map(str.isdigit, word)) else word for word in words)


def replaced(text: str, by: Mapping[str, str]) -> str:
    """A text with each of some parts replaced by another."""
    return re.sub("|".join(map(re.escape, by)), lambda found: by[found[0]], text)
