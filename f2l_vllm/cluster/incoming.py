"""A request as it reaches a front: its body is held while it is short, so that it can be sent a second time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from f2l_vllm.server.chat.request import QUESTION_ROUTES
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.middleware.lingering import announces_a_body

HELD_BYTES = 1 << 20  # of a body; the rest of a longer one is passed on as it comes
_IDLE_SECONDS = 60.0  # how long a body that is held may pause; engines bound the others


class Incoming:
    """One request.

    Attributes:
        held: its body; None: it is longer than `HELD_BYTES`, and `rest` yields it.
        is_taken: whether `rest` has begun.
        has_left: whether the client has closed the connection.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.send = scope, send
        self._receive = receive
        self._begun = b""
        self.held: bytes | None = b""
        self.is_taken = self.has_left = False
        self.path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        self.is_question: bool = scope["method"] == "POST" and self.path in QUESTION_ROUTES

    @property
    def may_be_repeated(self) -> bool:
        """Whether a second engine may get what a first one may have worked on."""
        return self.held is not None and (self.is_question or self.scope["method"] in ("GET", "HEAD", "OPTIONS"))

    async def read(self) -> None:
        """Read the body as far as it is held.

        Raises:
            APIError: `request_timeout`.
        """
        pieces, size = [], 0
        more = announces_a_body(Headers(scope=self.scope))
        while more and size <= HELD_BYTES:
            try:
                async with asyncio.timeout(_IDLE_SECONDS):
                    message = await self._next()
            except TimeoutError as error:
                raise _too_slow() from error
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            more = message.get("more_body", False)
        if more:
            self.held, self._begun = None, b"".join(pieces)
        else:
            self.held = b"".join(pieces)

    async def rest(self) -> AsyncIterator[bytes]:
        """A body that is not held: what was read, then what comes.

        Raises:
            ConnectionResetError: the client has left.
        """
        self.is_taken = True
        yield self._begun
        more = True
        while more:
            message = await self._next()
            if self.has_left:
                raise ConnectionResetError("the client has left")
            more = message.get("more_body", False)
            if body := message.get("body", b""):
                yield body

    async def while_connected(self, work: Coroutine[object, object, None]) -> None:
        """Do the work; cancel it when the client leaves. A body that is not held is for the work to read."""
        if self.has_left or self.held is None:
            return work.close() if self.has_left else await work
        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(self._leaving())
        try:
            await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _leaving(self) -> None:
        while not self.has_left:  # a request without a body has an empty one to give first
            await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self.has_left = self.has_left or message["type"] == "http.disconnect"
        return message


def _too_slow() -> APIError:
    message = f"Nothing came of the request's body for {_IDLE_SECONDS:g} s: send it again over a better connection."
    return APIError(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", message, headers={"Connection": "close"})
