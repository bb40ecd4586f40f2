"""`python -m tests.support.fake_engine MODEL --home H --host A --port P` answers like `f2l-vllm serve`, without models.

A question may hold `max_tokens`, `ms` (before each token) and `first_ms` (before the first one). The answer's chunks
hold the server's port as `engine`. `GET /asked` lists the models it was asked about. With `--slots`, so many questions
are answered at a time; `--grace` is how many seconds answers in work have when it is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from filelock import FileLock
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from f2l_vllm.server.middleware.load import Load
from f2l_vllm.settings import SERVER_LOCK


def build(engine: int, slots: int = 1000) -> Starlette:
    """The app; `engine` names it."""
    working, asked, free = set[object](), list[str](), asyncio.Semaphore(slots)
    uploaded = dict[str, int]()

    async def tokens(body: dict[str, Any]) -> AsyncIterator[str]:
        mark = object()
        working.add(mark)
        asked.append(body["model"])
        try:
            async with free:
                await asyncio.sleep(body.get("first_ms", 0) / 1000)
                for number in range(body.get("max_tokens", 5)):
                    await asyncio.sleep(body.get("ms", 0) / 1000)
                    delta = {"choices": [{"index": 0, "delta": {"content": f"{number} "}}], "engine": engine}
                    yield f"data: {json.dumps(delta)}\n\n"
                yield "data: [DONE]\n\n"
        finally:
            working.discard(mark)

    async def chat(request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            return StreamingResponse(tokens(body), media_type="text/event-stream")
        text = [piece async for piece in tokens(body)]
        return JSONResponse({"engine": engine, "tokens": len(text) - 1, "key": request.headers.get("authorization")})

    async def upload(request: Request) -> Response:
        size = 0
        async for piece in request.stream():
            size += len(piece)
        name = f"file-{engine}-{len(uploaded)}"
        uploaded[name] = size
        return JSONResponse({"id": name, "bytes": size, "engine": engine})

    async def health(_: Request) -> Response:
        return JSONResponse({"engine": engine})

    async def asked_about(_: Request) -> Response:
        return JSONResponse({"engine": engine, "asked": asked})

    async def metrics(_: Request) -> Response:
        return Response(f"vllm:num_requests_running {len(working)}\nvllm:num_requests_waiting 0\n")

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/files", upload, methods=["POST"]),
            Route("/health", health),
            Route("/ready", health),
            Route("/asked", asked_about),
            Route("/metrics", metrics),
        ],
        middleware=[Middleware(Load, load=lambda: len(working))],
    )


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int)
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--grace", type=int, default=1)
    options = parser.parse_args()
    with FileLock(options.home / SERVER_LOCK):
        uvicorn.run(
            build(options.port, options.slots),
            host=options.host,
            port=options.port,
            log_level="error",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=options.grace,
        )


if __name__ == "__main__":
    main()
