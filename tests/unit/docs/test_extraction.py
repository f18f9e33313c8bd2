"""How commands are found in the documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import documents
from tests.documents import Command, commands_of, inline_commands


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    return tmp_path / "page.md"


def found(page: Path, *lines: str) -> list[Command]:
    page.write_text("\n".join(("a page", "```console", *lines, "```", "its end", "")))
    return list(commands_of(page))


def test_commands_come_with_their_lines_and_their_output(page: Path) -> None:
    assert found(page, "$ one", "1", "…", "# two --of it") == [
        Command("page.md", 3, "one", ("1", "…"), 0),
        Command("page.md", 6, "two --of it", (), 0),
    ]


def test_a_command_may_have_several_lines(page: Path) -> None:
    (one, other) = found(page, "$ say 'a", "# b'", "$ say \\", "  more", "more")
    assert (one.text, one.output) == ("say 'a\n# b'", ())
    assert (other.text, other.output) == ("say \\\n  more", ("more",))


def test_an_exit_status_is_that_of_the_command_before(page: Path) -> None:
    assert found(page, "$ wrong", "Error: it is", "$ echo $?", "2") == [
        Command("page.md", 3, "wrong", ("Error: it is",), 2)
    ]


def test_output_that_belongs_to_no_command_is_refused(page: Path) -> None:
    with pytest.raises(ValueError, match=r"page\.md:3"):
        found(page, "Error")


def test_other_blocks_are_left_alone(page: Path) -> None:
    page.write_text("```sh\n$ one\n```\n")
    assert list(commands_of(page)) == []


def test_commands_in_running_text_may_be_wrapped() -> None:
    assert list(inline_commands("say `gpud drain\n  --all`, `gpud`, `gpud_up` or `make`")) == [
        "gpud drain --all", "gpud",
    ]  # fmt: skip
