"""Holds requests and responses against the API's OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import yaml
from openapi_schema_validator import OAS30Validator, oas30_format_checker

from gpud.api.web import openapi_document

_METHODS: Final = ("get", "put", "post", "delete", "options", "head", "patch", "trace")


@dataclass(frozen=True)
class Answer:
    """A response as it came over the wire."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of a problem."""
        return str(self.json["code"])


@cache
def document() -> dict[str, Any]:
    """The document with every reference replaced by what it refers to."""
    source = yaml.load(openapi_document(), yaml.CSafeLoader)

    def resolved(node: Any) -> Any:
        if isinstance(node, list):
            return [resolved(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            target = source
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            return resolved(target)
        return {key: resolved(value) for key, value in node.items()}

    return dict(resolved(source))


def documented() -> Iterator[tuple[str, str, str]]:
    """Every operation and status that the document promises, ``default`` left out."""
    for path, item in document()["paths"].items():
        for method in _METHODS:
            for status in item.get(method, {}).get("responses", {}):
                if status != "default":
                    yield method.upper(), path, status


def check_request(method: str, path: str, body: Any) -> None:
    """Fail unless ``body`` is what the operation asks for."""
    operation = _operation(method, path)
    assert operation is not None, f"{method} {path} is not in the document"
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    _check(schema, body, f"body of {method} {path}")


def check_response(method: str, path: str, answer: Answer) -> None:
    """Fail unless the document allows this response; what it does not know must be a problem."""
    where = f"{answer.status} to {method} {path}"
    operation = _operation("GET" if method == "HEAD" else method, path)
    problem = document()["components"]["responses"]["Problem"]
    responses = operation["responses"] if operation else {"default": problem}
    promised = responses.get(str(answer.status), responses.get("default"))
    assert promised is not None, f"{where} is not in the document"
    if promised is problem or promised == problem:
        assert answer.status >= 400, f"{where} is no problem"
    _check_headers(promised.get("headers", {}), answer.headers, where)
    if answer.status in {401, 403, 405, 429, 503}:
        # HTTP's own rules, which hold where the document has only a default (RFC 9110).
        companion = {401: "WWW-Authenticate", 403: "WWW-Authenticate", 405: "Allow"}
        assert companion.get(answer.status, "Retry-After") in answer.headers, where
    if method != "HEAD":
        _check_body(promised.get("content"), answer, where)


def _check_headers(promised: Mapping[str, Any], given: Mapping[str, str], where: str) -> None:
    for name, header in promised.items():
        value = given.get(name)
        assert value is not None or not header.get("required"), f"{where} lacks {name}"
        if value is not None:
            as_typed = int(value) if header["schema"]["type"] == "integer" else value
            _check(header["schema"], as_typed, f"{name} of {where}")


def _check_body(content: Mapping[str, Any] | None, answer: Answer, where: str) -> None:
    if content is None:
        assert not answer.body, f"{where} has a body"
        assert "Content-Type" not in answer.headers, f"{where} has a content type"
        return
    media_type = answer.headers["Content-Type"].split(";")[0]
    assert media_type in content, f"{where} is {media_type}"
    if "json" not in media_type:
        return
    _check(content[media_type]["schema"], answer.json, where)
    if "problem" in media_type:
        assert answer.json["status"] == answer.status
        assert answer.json["request_id"] == answer.headers["X-Request-Id"]
        assert answer.json["type"].endswith(f":{answer.code}")


def _operation(method: str, path: str) -> dict[str, Any] | None:
    for template, item in document()["paths"].items():
        pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template))
        if re.fullmatch(pattern, path.partition("?")[0]):
            found: dict[str, Any] | None = item.get(method.lower())
            return found
    return None


def _check(schema: Mapping[str, Any], value: Any, where: str) -> None:
    validator = OAS30Validator(schema, format_checker=oas30_format_checker)
    faults = [f"{fault.json_path}: {fault.message}" for fault in validator.iter_errors(value)]
    assert not faults, f"{where}: {faults}"
