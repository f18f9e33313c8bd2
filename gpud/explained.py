"""What each key of the configuration means: for the operator at a terminal, the manual and the documents.

The words are the comments of ``config/gpud.yaml``; what a key may be is the model's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from textwrap import dedent
from typing import Any, Final

import gpud.data
from gpud.config import Config

_KEY: Final = re.compile(r"^( *)(- )?([a-z_]+):(?: +(.*))?$")
_COMMENT: Final = re.compile(r"^ *(?:- )?# ?(.*)$")
_ENTRY: Final = "[]"
_KINDS: Final = {
    "boolean": "`true` or `false`",
    "null": "`null`",
    "path": "a path",
    "ipv4": "an address",
    "ipv4network": "a network",
    "ipv6network": "a network",
    "string": "text",
}

Schema = dict[str, Any]
"""A JSON Schema, as pydantic makes it."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the file.

    Attributes:
        path: ``a.b`` for key b below a, ``a[].b`` for that of each entry of a list.
        shown: The value that the annotated file shows; empty where other keys are below it.
        allowed: What it may be; empty where other keys are below it.
        default: As the file would have it; empty where the words tell of it.
        required: It must be given.
    """

    path: str
    shown: str
    allowed: str
    default: str
    required: bool

    def __str__(self) -> str:
        ending = (
            "; required" if self.required else f"; `{self.default}` by default" * bool(self.default)
        )
        return f"`{self.path}`: {self.allowed}{ending}"


@dataclass(frozen=True, slots=True)
class Topic:
    """Keys that share an explanation.

    Attributes:
        keys: In the file's order.
        lines: The words, in lines; those that are indented are examples.
    """

    keys: tuple[Key, ...]
    lines: tuple[str, ...]

    def is_about(self, path: str) -> bool:
        """Whether a key of this name, or one below it, is among them."""
        return any(
            one.path == path or one.path.startswith((f"{path}.", f"{path}[]")) for one in self.keys
        )

    def __str__(self) -> str:
        """In Markdown."""
        words = []
        for literal, lines in groupby(self.lines, key=lambda line: line.startswith("  ")):
            text = "\n".join(lines)
            words.append(f"```yaml\n{dedent(text)}\n```" if literal else text)
        values = "\n".join(f"- {one}" for one in self.keys if one.allowed)
        return "\n\n".join(filter(None, (*words, values)))


def document() -> str:
    """The reference of all keys, in Markdown."""
    parts = ["# Configuration", *"\n".join(preface()).split("\n\n")]
    section = ""
    for topic in topics():
        top = topic.keys[0].path.partition(".")[0].removesuffix(_ENTRY)
        parts += [f"## {top}"] * (top != section) + [str(topic)]
        section = top
    return "\n\n".join(filter(None, parts)) + "\n"


def preface() -> Sequence[str]:
    """What the file says of itself, in lines."""
    return [_COMMENT.sub(r"\1", line) for line in _text().partition("\n\n")[0].splitlines()]


def topics() -> Iterator[Topic]:
    """All keys, in the file's order.

    Keys that follow each other without a comment between them share the one above the first.
    """
    schema = Config.model_json_schema()
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    keys: list[Key] = []
    for line in [*_text().partition("\n\n")[2].splitlines(), ""]:
        said, key = _COMMENT.match(line), _KEY.match(line)
        if keys and (said or not line):
            yield Topic(tuple(keys), tuple(comment))
            keys, comment = [], []
        if said:
            comment.append(said[1])
        if line.lstrip().startswith("- "):
            path = [*((indent, name) for indent, name in path if indent < _indent(line))]
            path[-1] = (path[-1][0], path[-1][1].removesuffix(_ENTRY) + _ENTRY)
        if key:
            indent = _indent(line) + 2 * bool(key[2])
            path = [(at, name) for at, name in path if at < indent] + [(indent, key[3])]
            value, _, beside = (key[4] or "").partition("  #")
            comment += [beside.strip()] if beside else []
            keys.append(_key([name for _, name in path], value, schema))


def _text() -> str:
    return files(gpud.data).joinpath("config/gpud.yaml").read_text(encoding="utf-8")


def _key(names: Sequence[str], shown: str, schema: Schema) -> Key:
    at, required = schema, False
    for name in names:
        where, bare = _section(at, schema), name.removesuffix(_ENTRY)
        if "properties" not in where:  # a mapping whose keys are values too, such as prices by tier
            at, required = where["additionalProperties"], False
            continue
        at, required = where["properties"][bare], bare in where.get("required", ())
        if name != bare:
            at = at["items"]
    allowed = _allowed(at, schema)
    default = json.dumps(at["default"]) if "default" in at and allowed else ""
    return Key(".".join(names), shown, allowed, default, required)


def _section(at: Schema, schema: Schema) -> Schema:
    """Follow a reference to what is meant."""
    for one in (at, *at.get("anyOf", ())):
        if "$ref" in one:
            found: Schema = schema["$defs"][one["$ref"].rsplit("/", 1)[1]]
            return found
    return at


def _allowed(at: Schema, schema: Schema) -> str:
    """What a value may be, in words; empty for a section."""
    if "anyOf" in at:
        kinds = list(dict.fromkeys(_allowed(one, schema) or "a mapping" for one in at["anyOf"]))
        # A price is a decimal number, which may be written as text.
        return kinds[0] if kinds[0].startswith("a number") else " or ".join(kinds)
    where = _section(at, schema)
    if "enum" in where:
        return ", ".join(f"`{one}`" for one in where["enum"])
    match where["type"]:
        case "integer" | "number" as kind:
            words = _number(where, "a whole number" if kind == "integer" else "a number")
        case "array":
            words = f"a list of {_several(_allowed(where['items'], schema))}"
        case "object":
            words = "" if "properties" in where else "a mapping"
        case _:
            words = _KINDS[where.get("format") or where["type"]]
    return words


def _number(at: Schema, kind: str) -> str:
    low, above, high = (at.get(one) for one in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None:
        return f"{kind} from {low} to {high}" if high is not None else f"{kind} from {low}"
    return f"{kind} above {above}, to {high}" if above is not None else kind


def _several(kind: str) -> str:
    """The plural of what a value may be."""
    if kind.startswith("`"):
        return kind
    plurals = {"": "mappings", "an address": "addresses", "a whole number": "whole numbers"}
    noun = next((one for one in plurals if one and kind.startswith(one)), kind)
    return kind.replace(noun, plurals.get(noun, f"{noun.removeprefix('a ')}s"), 1)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
