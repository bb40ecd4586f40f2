"""Answers that are given before their request's body is there: the rest of the body is read after them.

A refusal needs only the head of a request, but a connection that is closed while its client still sends is reset, and
the client loses the answer with it.
"""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_IDLE_SECONDS = 1.0  # without a byte; who waits for the end of the connection waits so long
_LONGEST_SECONDS = 30.0


class Lingering:
    """ASGI middleware: after an answer, reads what the client still sends and drops it; only then the request ends.

    Args:
        app: the app behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not announces_a_body(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        whole = False

        async def noted() -> Message:
            nonlocal whole
            message = await receive()
            whole = not message.get("more_body", False)  # a client that has left sends no more either
            return message

        async def patient(message: Message) -> None:
            if whole or message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)
                return
            await send({**message, "more_body": True})  # all of the answer: the client may stop sending
            until = time.monotonic() + _LONGEST_SECONDS
            while not whole and (left := until - time.monotonic()) > 0:
                try:
                    async with asyncio.timeout(min(left, _IDLE_SECONDS)):
                        await noted()
                except TimeoutError:
                    break
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, noted, patient)


def announces_a_body(headers: Headers) -> bool:
    """Whether a request with this head has a body."""
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
