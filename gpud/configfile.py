"""Reads the YAML file into :class:`gpud.config.Config`, or says everything that is wrong with it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gpud.config import Config
from gpud.errors import Code, GpudError, Problem

_UNITS = {
    "_s": "a plain number of seconds",
    "_gib": "a plain number of GiB",
    "_kib": "a plain number of KiB",
    "_bytes": "a plain number of bytes",
    "_cores": "a plain number of cores",
    "per_hour": "a plain number, without a currency",
}


class _Loader(yaml.CSafeLoader):
    """PyYAML's safe loader, which also remembers keys given twice instead of keeping the last.

    The one on libyaml: it reads the shipped file in a fifteenth of the time, bounds how deep things may
    be nested, and its errors name the line without repeating it, on which a secret may stand.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.problems: list[Problem] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                where = f"line {line}, {key}"
                self.problems.append(Problem(where, f"given twice, first on line {seen[key]}"))
            seen.setdefault(key, line)
        return super().construct_mapping(node, deep)


def load_config(path: Path) -> Config:
    """Read and check the file.

    Raises:
        GpudError: ``CONFIG_INVALID``, with every problem found and its key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GpudError(Code.CONFIG_INVALID, f"cannot read {path}: {error}") from error
    return parse_config(text, str(path))


def parse_config(text: str, name: str = "config") -> Config:
    """Check the text of a config file; ``name`` is what messages call it.

    Raises:
        GpudError: ``CONFIG_INVALID``, with every problem found and its key.
    """
    try:
        loader = _Loader(text)
        data = loader.get_single_data()
        if data is None:
            data = {}
        # Dates and the like become text; what refers to itself, or has a date for a key, is refused.
        document = json.dumps(data, default=str)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise GpudError(Code.CONFIG_INVALID, f"{name} is not YAML: {error}") from error
    problems = list(loader.problems)
    config: Config | None = None
    if isinstance(data, dict):
        try:
            # Strict JSON mode: text becomes a path, an address or an enum, but never a number.
            config = Config.model_validate_json(document)
        except ValidationError as error:
            problems += [_problem(detail) for detail in error.errors()]
    else:
        problems.append(Problem("(top level)", "must be a mapping of keys to values"))
    if problems or config is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise GpudError(Code.CONFIG_INVALID, f"{name}: {count}", problems=problems)
    return config


def _problem(detail: ErrorDetails) -> Problem:
    what = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        what = "unknown key"
    elif detail["type"] == "missing":
        what = "missing"
    elif detail["input"] is None and detail["type"].endswith("_type"):
        what = "not filled in"
    return Problem(_dotted(detail["loc"]), what, _hint(detail))


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        if part == "[key]":  # pydantic's way to say that the last part itself is wrong
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".") or "(top level)"


def _hint(detail: ErrorDetails) -> str:
    key = str(detail["loc"][-1]) if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, _sibling_keys(detail["loc"]), n=1)
        return f"did you mean {close[0]}?" if close else ""
    if isinstance(detail["input"], str) and "number" in detail["msg"] + detail["type"]:
        return _unit_hint(key)
    if isinstance(detail["input"], str) and detail["type"].startswith(("int", "float", "decimal")):
        return _unit_hint(key)
    return ""


def _unit_hint(key: str) -> str:
    unit = next((text for ending, text in _UNITS.items() if key.endswith(ending)), "a plain number")
    return f"write {unit}, unquoted"


def _sibling_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys the model knows beside the unknown one; empty where the path leaves the model."""
    model: Any = Config
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        model = _section_of(field.annotation) if field is not None else None
        if model is None:
            return []
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 - any type expression
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
