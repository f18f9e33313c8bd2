"""Writes gpud's manual pages: gpud(1) from the command, gpud.yaml(5) from what it tells of keys.

Run by ``install.sh`` with the Python that gpud is installed for; the pages are mdoc(7).
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import click

from gpud.cli import main as command
from gpud.explained import Key, Topic, preface, topics

_SENTENCE = re.compile(r"(?<=[\w)`'\"][.?!]) +")
_SHARED = 4
"""An option that so many commands have is told of once."""

_FILES = """\
.Bl -tag -width Ds
.It Pa /etc/gpud/gpud.yaml
The configuration, see
.Xr gpud.yaml 5 .
.It Pa /var/lib/gpud
The record of all orders, the images, and the disks and consoles of guests.
.It Pa /run/gpud/gpud.sock
Where the daemon answers the operator: root, and members of group
.Li gpud .
.El
"""
_EXIT = """\
0 when all went well, 2 for a wrong command line, 1 for everything else,
unless a command says otherwise.
"""
_EXAMPLES = """\
.Bl -tag -width Ds
.It Li gpud config check && systemctl restart gpud
Use a changed configuration.
.It Li gpud doctor
What keeps this server from selling, and what mends it.
.It Li gpud image add noble.qcow2 --name base
Bring in the disk image that guests stand on.
.It Li journalctl -u gpud -f
What the daemon says.
.El
"""


def main() -> None:
    """Write both pages into the directory that is named."""
    directory = Path(sys.argv[1])
    (directory / "gpud.1").write_text(command_page(command), encoding="utf-8")
    (directory / "gpud.yaml.5").write_text(config_page(), encoding="utf-8")


def command_page(group: click.Group) -> str:
    """gpud(1), all verbs on one page."""
    leaves = list(_leaves(group, click.Context(group, info_name="gpud")))
    count = Counter(one for leaf in leaves for one in _options(leaf))
    shared = [one for one in count if count[one] >= _SHARED]
    verbs = "".join(_verb(leaf, shared) for leaf in leaves)
    return (
        _head("GPUD", 1)
        + f".Sh NAME\n.Nm gpud\n.Nd {_text('the Supplier API daemon for one GPU server')}\n"
        + ".Sh SYNOPSIS\n.Nm\n.Op Fl Fl version\n.Op Fl h | Fl Fl help\n"
        + ".Ar command\n.Op Ar argument ...\n"
        + f".Sh DESCRIPTION\n{_paragraphs(inspect.cleandoc(group.help or ''))}"
        + ".Pp\nThe daemon is the service\n.Li gpud\nof\n.Xr systemd 1 .\n"
        + "Most commands ask it over its socket, so they are for root and for members of\n"
        + "group\n.Li gpud .\n.Pp\nOptions of many commands:\n"
        + f".Bl -tag -width Ds\n{_option_list(shared)}.El\n"
        + f".Sh COMMANDS\n.Bl -tag -width Ds\n{verbs}.El\n"
        + f".Sh ENVIRONMENT\n.Bl -tag -width Ds\n{_environment(leaves)}.El\n"
        + f".Sh FILES\n{_FILES}.Sh EXIT STATUS\n{_EXIT}.Sh EXAMPLES\n{_EXAMPLES}"
        + ".Sh SEE ALSO\n.Xr systemctl 1 ,\n.Xr virsh 1 ,\n.Xr gpud.yaml 5\n"
    )


def config_page() -> str:
    """gpud.yaml(5): every key with its comment."""
    return (
        _head("GPUD.YAML", 5)
        + ".Sh NAME\n.Nm gpud.yaml\n.Nd configuration of gpud\n"
        + f".Sh DESCRIPTION\n{_paragraphs(chr(10).join(preface()))}"
        + ".Pp\nKeys are shown with their defaults, or with an example where they have none;\n"
        + ".Li a.b\nis key\n.Li b\nbelow\n.Li a ,\nand\n.Li a[].b\nthat of each entry of a list.\n"
        + f".Sh KEYS\n.Bl -tag -width Ds\n{''.join(map(_entry, topics()))}.El\n"
        + ".Sh FILES\n.Bl -tag -width Ds\n.It Pa /etc/gpud/gpud.yaml\n"
        + "What the service reads; owned by root, and readable for group\n.Li gpud .\n"
        + ".It Pa /usr/share/doc/gpud/examples/gpud.yaml\nThis page as a file.\n.El\n"
        + ".Sh SEE ALSO\n.Xr gpud 1\n"
    )


def _head(title: str, section: int) -> str:
    at = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    day = f"{time.strftime('%B', at)} {at.tm_mday}, {at.tm_year}"
    return f".Dd {day}\n.Dt {title} {section}\n.Os\n"


def _leaves(group: click.Group, context: click.Context) -> Iterator[click.Context]:
    """The commands that do something, each with the words that lead to it."""
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        if found is None or found.hidden:
            continue
        below = click.Context(found, info_name=name, parent=context)
        if not isinstance(found, click.Group) or found.invoke_without_command:
            yield below
        if isinstance(found, click.Group):
            yield from _leaves(found, below)


def _options(context: click.Context) -> Iterator[tuple[str, str]]:
    """Each option's flags and what it is for."""
    for one in context.command.params:
        if isinstance(one, click.Option) and not one.hidden:
            yield _flags(one), one.help or ""


def _option_list(options: Iterable[tuple[str, str]]) -> str:
    return "".join(f".It {flags}\n" + (_fill(text) if text else "") for flags, text in options)


def _verb(context: click.Context, shared: list[tuple[str, str]]) -> str:
    usage = "".join(_usage(one, context) for one in context.command.params)
    options = _option_list(one for one in _options(context) if one not in shared)
    return (
        f".It Xo\n.Cm {context.command_path.partition(' ')[2]}\n{usage}.Xc\n"
        + _paragraphs(inspect.cleandoc(context.command.help or ""))
        + (f".Bl -tag -width Ds\n{options}.El\n" if options else "")
    )


def _usage(parameter: click.Parameter, context: click.Context) -> str:
    if isinstance(parameter, click.Option):
        words = _flags(parameter)
        return "" if parameter.hidden else f".{words}\n" if parameter.required else f".Op {words}\n"
    name = f"Ar {parameter.make_metavar(context).strip('[].')}" + " ..." * (parameter.nargs != 1)
    return f".{name}\n" if parameter.required else f".Op {name}\n"


def _flags(option: click.Option) -> str:
    names = [f"Fl {'Fl ' * name.startswith('--')}{_text(name.lstrip('-'))}" for name in option.opts]
    value = option.make_metavar(click.Context(command)) if not option.is_flag else ""
    return " | ".join(names) + (f" Ar {_text(value)}" if value else "")


def _environment(leaves: list[click.Context]) -> str:
    params = (one for leaf in leaves for one in leaf.command.params)
    found = {one.envvar: one for one in params if isinstance(one, click.Option) and one.envvar}
    return "".join(
        f".It Ev {name}\nStands for\n.Fl Fl {one.opts[0].lstrip('-')} .\n"
        for name, one in found.items()
    )


def _entry(topic: Topic) -> str:
    first, *others = (f".It Li {_text(_quoted(_shown(one)))}\n" for one in topic.keys)
    return first + (_paragraphs("\n".join(topic.lines)) if topic.lines else "") + "".join(others)


def _shown(key: Key) -> str:
    return f"{key.path}: {key.shown}" if key.shown else key.path


def _quoted(key: str) -> str:
    """An argument of a macro, which would take a word such as ``Li`` or ``Ar`` for another macro."""
    return '"' + key.replace('"', '""') + '"'


def _paragraphs(text: str) -> str:
    """Lines that are indented are examples, and stay as they are."""
    written = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\b\n", "")):
        for literal, lines in groupby(
            paragraph.splitlines(), key=lambda line: line.startswith("  ")
        ):
            if literal:
                shown = "\n".join(_text(line) for line in lines)
                written.append(f".Bd -literal -compact\n{shown}\n.Ed\n")
            else:
                written.append(_fill(" ".join(lines)))
        written.append(".Pp\n")
    return "".join(written[:-1])


def _fill(text: str) -> str:
    """Each sentence on lines of its own, as mdoc wants it."""
    return "".join(
        f"{_text(line)}\n"
        for sentence in _SENTENCE.split(text)
        for line in textwrap.wrap(sentence, 74)
    )


def _text(text: str) -> str:
    """Words as roff shows them; what is between backticks is a command."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    text = re.sub(r"`+([^`]+)`+", r"\\(oq\1\\(cq", text)
    return rf"\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    main()
