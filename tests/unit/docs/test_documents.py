"""What the documents for people say, held against the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from gpud.cli import VERBS, main
from gpud.configfile import parse_config
from gpud.errors import HTTP_STATUS
from tests.documents import PAGES, ROOT, Command, commands_of, inline_commands

DOCS = ROOT / "docs"
ALERTS = ROOT / "config/prometheus-alerts.yaml"
EVERYWHERE = (*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md")
TYPED = [one for page in PAGES for one in commands_of(page)]


@pytest.mark.parametrize("page", EVERYWHERE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT)
        if anchor:
            assert anchor in set(anchors(file)), f"{page.name}: {target}"


def test_the_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\(([a-z]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


def test_the_table_of_errors_is_that_of_the_code() -> None:
    rows = re.findall(
        r"^\| `([a-z_]+)` \| ([0-9]{3}) \|", (DOCS / "api.md").read_text(), re.MULTILINE
    )
    assert {code: int(status) for code, status in rows} == {
        code.value: status for code, status in HTTP_STATUS.items()
    }


def test_every_alert_is_told_of_under_its_symptom() -> None:
    told = re.findall(r"\bGpud[A-Z]\w+", (DOCS / "troubleshooting.md").read_text())
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    assert set(told) == {rule["alert"] for group in groups for rule in group["rules"]}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_told_of(verb: str) -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert re.search(rf"\bgpud {verb}\b", text)


@pytest.mark.parametrize("command", [one for one in TYPED if "gpud " in one.text], ids=str)
def test_what_is_to_be_typed_is_known_to_the_command(command: Command) -> None:
    for words in calls(command.text):
        assert not missing(words), f"{command}\nlacks {missing(words)}"


@pytest.mark.parametrize("page", [*PAGES, ALERTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_named_in_passing_is_known_to_the_command(page: Path) -> None:
    for text in inline_commands(page.read_text()):
        for words in calls(re.sub(r"{{.*?}}", "X", re.sub(r"[][]", "", text))):
            missing(words)  # which raises where a verb or an option is not known


def test_the_configuration_to_begin_with_is_valid() -> None:
    (block,) = re.findall(
        r"^```yaml\n(.*?)^```$", (DOCS / "install.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert sum(len(offer.gpu_counts) for offer in parse_config(block).offers) == 4


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("image remove base", "No such command"),
        ("drain --everything", "no option --everything"),
        ("console a b", "takes no more"),
        ("config nonsense", "No such command"),
    ],
)
def test_a_command_that_is_not_known_is_seen(words: str, wrong: str) -> None:
    with pytest.raises((click.UsageError, AssertionError), match=wrong):
        missing(words.split())


def test_a_required_option_that_is_missing_is_seen() -> None:
    assert missing(["gpus", "quarantine", "0000:36:00.0"]) == ["--reason"]


def anchors(page: Path) -> Iterator[str]:
    """What headings can be linked by, as GitHub makes it."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def calls(text: str) -> Iterator[list[str]]:
    """The arguments of each call of gpud's command in a shell's line."""
    for part in re.split(r"&&|[|;]", text):
        words = shlex.split(part, comments=True)
        if "gpud" in words and words[0] in {"gpud", "sudo", "runuser"}:
            yield words[words.index("--" if words[0] == "runuser" else "gpud") + 1 :][
                words[0] == "runuser" :
            ]


def missing(words: list[str]) -> list[str]:
    """What a call of the command lacks.

    Raises:
        click.UsageError: There is no such verb.
        AssertionError: There is no such option, or there are too many arguments.
    """
    command: click.Command = main
    context = click.Context(main)
    left, given, arguments = list(words), set(), 0
    while left:
        word = left.pop(0)
        if word.startswith("-"):
            option = option_of(command, word.partition("=")[0])
            given.add(option.name)
            if not option.is_flag and option.name != "help" and "=" not in word:
                left.pop(0)
        elif isinstance(command, click.Group):
            _, found, left = command.resolve_command(context, [word, *left])
            assert found is not None
            command, given, arguments = found, set(), 0
        else:
            arguments += 1
    own = [one for one in command.params if isinstance(one, click.Argument)]
    assert arguments <= len(own) or any(one.nargs < 0 for one in own), f"{words}: takes no more"
    needed = [
        one.opts[0] for one in command.params if isinstance(one, click.Option) and one.required
    ]
    lacking = [one for one in needed if option_of(command, one).name not in given]
    return lacking + [str(one.name) for one in own[arguments:] if one.required]


def option_of(command: click.Command, name: str) -> click.Option:
    """An option of a verb by its name.

    Raises:
        AssertionError: It has none of that name.
    """
    # A command keeps the help option that it is first asked for.
    context = click.Context(command, help_option_names=["-h", "--help"])
    for one in command.get_params(context):
        if isinstance(one, click.Option) and name in (*one.opts, *one.secondary_opts):
            return one
    raise AssertionError(f"{command.name}: no option {name}")
