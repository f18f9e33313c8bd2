"""The floor of an HTTP answer: a bare aiohttp handler that returns the bytes of a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from aiohttp import web


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bare")
    parser.add_argument("port", type=int)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    body: bytes = arguments.file.read_bytes()

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.add_routes([web.get("/", answer)])
    web.run_app(app, host="127.0.0.1", port=arguments.port, access_log=None, print=None)


if __name__ == "__main__":
    main()
