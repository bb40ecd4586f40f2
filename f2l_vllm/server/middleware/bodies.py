"""Reads, counts, parses and checks the body of every request except uploads, before any route sees it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from f2l_vllm.server.chat.constraints import Constraint
from f2l_vllm.server.chat.constraints import constraints as constraints_of
from f2l_vllm.server.chat.content import admit
from f2l_vllm.server.chat.request import QUESTION_ROUTES
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.middleware import costs, json_bodies
from f2l_vllm.server.middleware.auth import reads_its_body
from f2l_vllm.server.middleware.lingering import announces_a_body
from f2l_vllm.server.middleware.pace import Pace
from f2l_vllm.server.tenants import DEFAULT_TENANT, asking_tenant

_WITHOUT_BODY = frozenset({"GET", "HEAD", "DELETE", "TRACE", "OPTIONS"})
_ROOM = 4  # of the largest bodies
_SMALL_BYTES = 1 << 14  # bodies up to this size need not take turns
_RESPONSES_ROUTE = "/v1/responses"


class Bodies:
    """ASGI middleware that passes on the whole body, parsed and checked. Raises `APIError` for a body that no handler
    could read, that holds what clients may not send, or that would slow down all other requests.

    Args:
        app: the app behind it.
        max_body_bytes: the cap of one body.
        max_images: the cap of pictures in one body.
        has_tenants: whether keys distinguish callers. If so, one tenant gets at most half of the room for bodies, and
            after a large body waits before its next one, so that others get their turn.
        check: refuses a constraint in a generating route's body, for a tenant; cancelled when the client goes away.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_images: int,
        has_tenants: bool,
        check: Callable[[Constraint, str], Awaitable[None]],
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_images = max_images
        self._room = _ROOM * max_body_bytes
        self._share = self._room // 2 if has_tenants else self._room
        self._held: Counter[str] = Counter()
        self._check = check
        self._pace = Pace() if has_tenants else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        tenant = scope.get("state", {}).get("tenant", DEFAULT_TENANT)
        asking_tenant.set(tenant)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers, held = Headers(scope=scope), _Held(self, tenant)
        if reads_its_body(path) or (scope["method"] in _WITHOUT_BODY and not announces_a_body(headers)):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(headers, receive, held)
            if scope["method"] in _WITHOUT_BODY:  # read it anyway: a client that still sends does not read an answer
                await self._app(scope, _replay(b"", receive), send)
                return
            if self._pace is not None and len(body) > _SMALL_BYTES:
                await self._pace.turn(tenant)
                with self._pace.taking(tenant, len(body)):
                    body, constraints = self._admitted(path, headers, body, tenant)
            else:
                body, constraints = self._admitted(path, headers, body, tenant)
            if constraints:
                await _while_connected(self._try(constraints, tenant), receive)
            await self._app(scope, _replay(body, receive), send)
        finally:
            held.release()

    def _admitted(self, path: str, headers: Headers, body: bytes, tenant: str) -> tuple[bytes, list[Constraint]]:
        """The body as its route may see it, and the constraints to try."""
        value = _parsed(body, headers.get("content-type", ""))
        if value is None:
            return body, []
        changed = admit(value, tenant, self._max_images)
        if path == _RESPONSES_ROUTE and isinstance(value, dict) and None in value.values():
            # A null means the default, but vLLM's answers repeat it in fields that cannot hold null.
            value, changed = {name: given for name, given in value.items() if given is not None}, True
        found = []
        if path in QUESTION_ROUTES:
            costs.check(value)
            found = constraints_of(value)
        return json.dumps(value).encode() if changed else body, found

    async def _try(self, constraints: list[Constraint], tenant: str) -> None:
        for constraint in constraints:
            await self._check(constraint, tenant)

    async def _read(self, headers: Headers, receive: Receive, held: _Held) -> bytes:
        length = headers.get("content-length", "")
        if length.isascii() and length.isdecimal() and int(length[:19]) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        pieces = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnect
            piece = message.get("body", b"")
            held.take(len(piece))
            pieces.append(piece)
            if not message.get("more_body"):
                return b"".join(pieces)


class _Held:
    """The room that one body takes until its request has ended."""

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


def _parsed(body: bytes, content_type: str) -> Any:
    """The body's JSON value; None if no route would read the body as JSON."""
    kind = content_type.split(";")[0].strip().lower()
    if kind in ("", "application/json") or kind.endswith("+json"):
        return json_bodies.parse(body) if body else None
    try:
        value = json.loads(body)  # accepts all encodings that a route's own parser would read
    except ValueError:
        return None
    except RecursionError as error:
        raise json_bodies.too_deep() from error
    json_bodies.check(value)
    return value


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


def _replay(body: bytes, receive: Receive) -> Receive:
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return whole.pop() if whole else await receive()

    return replay


def _too_large(cap: int) -> APIError:
    message = f"The request's body is larger than the {cap / 1e6:.0f} MB this server reads: upload videos as files."
    return APIError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request_too_large", message)
