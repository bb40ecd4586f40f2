"""Tells whoever stands in front of several servers how much each of them has to do."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-f2l-load"


class Load:
    """ASGI middleware: every response has the number of requests in the engine, running and waiting, in `HEADER`.

    `/metrics` tells the same to everybody; a header costs no request of its own.

    Args:
        app: the app behind it.
        load: counts them.
    """

    def __init__(self, app: ASGIApp, load: Callable[[], int]) -> None:
        self._app = app
        self._load = load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = str(self._load())
            await send(message)

        await self._app(scope, receive, noted)
