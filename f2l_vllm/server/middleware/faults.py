"""Answers every error raised behind it, in the envelope of the API that was called, and keeps the connection."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from f2l_vllm.server import vllm_errors
from f2l_vllm.server.errors import APIError, bad_request, internal_error, response

logger = logging.getLogger(__name__)


class Faults:
    """ASGI middleware: answers every exception raised behind it, and keeps the connection.

    Args:
        app: the app behind it.
        idle_seconds: how long a body may pause.
    """

    def __init__(self, app: ASGIApp, idle_seconds: float) -> None:
        self._app = app
        self._idle_seconds = idle_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = replaced = False

        async def noted(message: Message) -> None:
            nonlocal started, replaced
            refused = None if started else scope.get("state", {}).get("refused")
            started = True
            if refused is not None:  # by a handler whose route answers in a poorer way
                replaced = True
                await response(refused, scope)(scope, receive, send)
            elif not replaced:
                await send(message)

        try:
            _check_head(scope)
            vllm_errors.follow()
            await self._app(scope, self._punctual(receive), noted)
        except ClientDisconnect:
            return
        except Exception as error:
            if started:
                raise  # cuts the connection, so that no client takes the part that was sent for a whole answer
            refusal = vllm_errors.refusal(error, scope)
            if refusal is None:
                logger.exception("%s %r failed", scope["method"], scope["path"])
            await response(refusal or internal_error(), scope)(scope, receive, send)

    def _punctual(self, receive: Receive) -> Receive:
        whole = False

        async def punctual() -> Message:
            nonlocal whole
            if whole:  # the next message is the client's disconnect, which may take any time
                return await receive()
            try:
                async with asyncio.timeout(self._idle_seconds):
                    message = await receive()
            except TimeoutError as error:
                raise _too_slow(self._idle_seconds) from error
            whole = not message.get("more_body", False)
            return message

        return punctual


def _check_head(scope: Scope) -> None:
    if "\0" in scope["path"] or b"%00" in scope.get("query_string", b""):
        raise bad_request("invalid_request", "The address holds the character NUL, which is in no name here.")
    if Headers(scope=scope).get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        message = "This server reads bodies as they are: send it without Content-Encoding."
        raise APIError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_content_encoding", message)


def _too_slow(seconds: float) -> APIError:
    message = f"Nothing came of the request's body for {seconds:g} s: send it again over a better connection."
    return APIError(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", message, headers={"Connection": "close"})
