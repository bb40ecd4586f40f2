"""Every request's body but an upload's is read here first, whatever route it is for: counted, parsed, and admitted."""

from __future__ import annotations

import json
from collections import Counter
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from f2l_vllm.serving.content import admit
from f2l_vllm.serving.errors import APIError, bad_request, response
from f2l_vllm.serving.tenants import DEFAULT_TENANT

UPLOAD_ROUTE = "/v1/files"  # a stream of its own, with a cap of its own
_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS"})
_ROOM = 4  # of the largest bodies

# Whose request is in work, for what is called far from it.
asking_tenant: ContextVar[str] = ContextVar("asking_tenant", default=DEFAULT_TENANT)


class Bodies:
    """ASGI middleware. A route gets the body whole, as it was parsed and checked here.

    Args:
        app: what is behind it.
        max_body_bytes: of one body.
        max_images: pictures in one.
        has_tenants: whether callers are told apart; then one of them has half of the room for bodies at the most.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_images: int, has_tenants: bool) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_images = max_images
        self._room = _ROOM * max_body_bytes
        self._share = self._room // 2 if has_tenants else self._room
        self._held: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        tenant = scope.get("state", {}).get("tenant", DEFAULT_TENANT)
        asking_tenant.set(tenant)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] in _WITHOUT_BODY or path.rstrip("/") == UPLOAD_ROUTE:
            await self._app(scope, receive, send)
            return
        held = _Held(self, tenant)
        try:
            try:
                body = await self._read(Headers(scope=scope), receive, held)
                if body is None:
                    return  # the client has gone
                body = self._admitted(body, tenant)
            except APIError as error:
                await response(error)(scope, receive, send)
                return
            await self._app(scope, _replay(body, receive), send)
        finally:
            held.release()

    async def _read(self, headers: Headers, receive: Receive, held: _Held) -> bytes | None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        pieces = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            piece = message.get("body", b"")
            held.take(len(piece))
            pieces.append(piece)
            if not message.get("more_body"):
                return b"".join(pieces)

    def _admitted(self, body: bytes, tenant: str) -> bytes:
        try:
            parsed = json.loads(body)
        except ValueError:
            return body  # the route says what is wrong with it, for it parses it in the same way
        except RecursionError:
            raise bad_request("invalid_request", "The body's objects are nested too deeply.") from None
        return json.dumps(parsed).encode() if admit(parsed, tenant, self._max_images) else body


class _Held:
    """The room that one body takes, until its request has ended."""

    def __init__(self, bodies: Bodies, tenant: str) -> None:
        self._bodies, self._tenant, self._bytes = bodies, tenant, 0

    def take(self, count: int) -> None:
        held = self._bodies._held
        self._bytes += count
        held[self._tenant] += count
        if self._bytes > self._bodies._max_body_bytes:
            raise _too_large(self._bodies._max_body_bytes)
        if held[self._tenant] > self._bodies._share or held.total() > self._bodies._room:
            message = "The requests in work hold as many bytes as this server has room for: ask again in some seconds."
            raise APIError(HTTPStatus.SERVICE_UNAVAILABLE, "too_many_bytes", message, headers={"Retry-After": "2"})

    def release(self) -> None:
        held = self._bodies._held
        held[self._tenant] -= self._bytes
        if not held[self._tenant]:
            del held[self._tenant]


def _replay(body: bytes, receive: Receive) -> Receive:
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return whole.pop() if whole else await receive()

    return replay


def _too_large(cap: int) -> APIError:
    message = f"The request's body is larger than the {cap / 1e6:.0f} MB this server reads: upload videos as files."
    return APIError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request_too_large", message)
