"""Between the door and vLLM's routes: what comes in can be read, and what fails behind is answered.

`Faults` answers every failure in the envelope of the API that was asked; `Intake` refuses bodies that no handler could
read, or that would cost all other requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from f2l_vllm.serving import compat_errors, costs, json_bodies
from f2l_vllm.serving.errors import APIError, bad_request, internal_error, response
from f2l_vllm.serving.routes import UPLOAD_ROUTE, VLLM_ROUTES
from f2l_vllm.serving.tenants import DEFAULT_TENANT

logger = logging.getLogger(__name__)

_WITHOUT_BODY = ("GET", "HEAD", "DELETE", "TRACE", "OPTIONS")


class Faults:
    """ASGI middleware: whatever is raised behind it is answered, and the connection kept.

    Args:
        app: what is behind it.
        idle_seconds: how long a body may pause.
    """

    def __init__(self, app: ASGIApp, idle_seconds: float) -> None:
        self._app = app
        self._idle_seconds = idle_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            _check_head(scope)
            compat_errors.follow()
            await self._app(scope, self._punctual(receive), noted)
        except ClientDisconnect:
            return
        except Exception as error:
            if started:
                raise  # the connection is cut, so that nobody takes what was sent for a whole answer
            refusal = compat_errors.refusal(error, scope)
            if refusal is None:
                logger.exception("%s %r failed", scope["method"], scope["path"])
            await response(refusal or internal_error(), scope)(scope, receive, send)

    def _punctual(self, receive: Receive) -> Receive:
        whole = False

        async def punctual() -> Message:
            nonlocal whole
            if whole:  # what is waited for is the client's leaving
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._idle_seconds)
            except TimeoutError as error:
                raise _too_slow(self._idle_seconds) from error
            whole = not message.get("more_body", False)
            return message

        return punctual


class Intake:
    """ASGI middleware: a JSON body goes on once it is known that handlers can read it.

    Args:
        app: what is behind it.
        check: refuses a generating route's body, for a tenant, by an `APIError`; ended when the client goes away.
    """

    def __init__(self, app: ASGIApp, check: Callable[[Any, str], Awaitable[None]]) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] in _WITHOUT_BODY or path.rstrip("/") == UPLOAD_ROUTE:
            await self._app(scope, receive, send)
            return
        body = await _whole(receive)
        if body and _is_json(Headers(scope=scope).get("content-type", "")):
            value = json_bodies.parse(body)
            if path in VLLM_ROUTES:
                costs.check(value)
                tenant = scope.get("state", {}).get("tenant", DEFAULT_TENANT)
                await _while_connected(self._check(value, tenant), receive)
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


def _check_head(scope: Scope) -> None:
    if "\0" in scope["path"] or b"%00" in scope.get("query_string", b""):
        raise bad_request("invalid_request", "The address holds the character NUL, which is in no name here.")
    if Headers(scope=scope).get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        message = "This server reads bodies as they are: send it without Content-Encoding."
        raise APIError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_content_encoding", message)


async def _whole(receive: Receive) -> bytes:
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _while_connected(work: Awaitable[None], receive: Receive) -> None:
    """Do the work, unless the client goes away first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def _is_json(content_type: str) -> bool:
    kind = content_type.split(";")[0].strip().lower()
    return kind in ("", "application/json") or kind.endswith("+json")


def _too_slow(seconds: float) -> APIError:
    message = f"Nothing came of the request's body for {seconds:g} s: send it again over a better connection."
    return APIError(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", message, headers={"Connection": "close"})
