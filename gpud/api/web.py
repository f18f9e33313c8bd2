"""The HTTP application that GPU.ai calls."""

from __future__ import annotations

from importlib.resources import files

from aiohttp import web

from gpud.api.gate import Gate
from gpud.api.routes import Routes


def openapi_document() -> bytes:
    """The OpenAPI document of the API, as it is served."""
    return files("gpud.api").joinpath("openapi.yaml").read_bytes()


def build_app(gate: Gate, routes: Routes) -> web.Application:
    """Put the application together."""
    app = web.Application(middlewares=[gate.pass_through])
    document = openapi_document()

    async def openapi(_: web.Request) -> web.Response:
        return web.Response(body=document, content_type="application/yaml")

    app.add_routes(
        [
            web.get("/openapi.yaml", openapi),
            web.get("/v1/gpu/available", routes.available),
            # Before the orders, whose path begins alike: aiohttp tries one after the other.
            web.get("/v1/instances/{id}", routes.show),
            web.delete("/v1/instances/{id}", routes.delete),
            web.post("/v1/instances", routes.create),
        ]
    )
    return app
