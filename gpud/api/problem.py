"""Errors as ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

import json
from http import HTTPStatus

from aiohttp import web

from gpud.api.auth import AuthError
from gpud.errors import Code, GpudError

_UNSPOKEN = "something went wrong inside; the daemon's log has it under this request_id"


def problem(error: GpudError, request_id: str) -> web.Response:
    """The response for an error. Errors that are not for callers keep their text to themselves."""
    inside = error.http_status == HTTPStatus.INTERNAL_SERVER_ERROR
    code = Code.INTERNAL if inside else error.code
    body = _body(error, code, _UNSPOKEN if inside else error.detail)
    response = _response(error, {**body, "request_id": request_id})
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, AuthError) and error.www_authenticate is not None:
        response.headers["WWW-Authenticate"] = error.www_authenticate
    return response


def problem_in_full(error: GpudError) -> web.Response:
    """The response for the operator: whatever the error is, with what to do about it."""
    body = {**_body(error, error.code, error.detail), "hint": error.hint}
    if error.problems:
        body["errors"] = [
            {"field": p.where, "detail": p.what, "hint": p.hint} for p in error.problems
        ]
    return _response(error, body)


def _body(error: GpudError, code: Code, detail: str) -> dict[str, object]:
    body: dict[str, object] = {
        "type": f"urn:gpud:problem:{code.value}",
        "title": HTTPStatus(error.http_status).phrase,
        "status": error.http_status,
        "detail": detail,
        "code": code.value,
    }
    if error.problems:
        body["errors"] = [{"field": one.where, "detail": one.what} for one in error.problems]
    return body


def _response(error: GpudError, body: dict[str, object]) -> web.Response:
    return web.Response(
        body=json.dumps(body).encode(),
        status=error.http_status,
        content_type="application/problem+json",
    )


def from_http(error: web.HTTPException) -> GpudError:
    """What aiohttp raises by itself, in our words."""
    if isinstance(error, web.HTTPNotFound):
        return GpudError(Code.NOT_FOUND, "there is nothing at this path")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return GpudError(Code.METHOD_NOT_ALLOWED, f"this path takes {allowed}")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return GpudError(Code.PAYLOAD_TOO_LARGE, "the body is too large")
    return GpudError(Code.INVALID_REQUEST, "the request is not valid HTTP for this path")
