"""What can be reached, and by whom: an allow-list of routes, and a key check in front of them.

vLLM's own server has more routes than this one needs, and its key check leaves some of them open. Here a route that is
not listed does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from http import HTTPStatus

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from f2l_vllm.server.chat.request import QUESTION_ROUTES, STORED_ROUTES
from f2l_vllm.server.errors import APIError, response, unavailable
from f2l_vllm.server.tenants import ON_BEHALF, Keys
from f2l_vllm.server.videos.routes import router
from f2l_vllm.store.errors import Unavailable

_STREAMED = re.compile("/v1/files|/v1/uploads/[^/]*/parts|/v1/streams/[^/]*/push/.*")


def keep_listed_routes(app: FastAPI, listed: Collection[str]) -> None:
    """Remove every route except this server's own, those of vLLM's for questions, and those that the operator lists."""
    own = {getattr(route, "path", "") for route in router.routes}
    kept = own | QUESTION_ROUTES | STORED_ROUTES | set(listed)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in kept]


def reads_its_body(path: str) -> bool:
    """Whether the route at this path reads its own body, as a stream and with its own cap."""
    return _STREAMED.fullmatch(path.rstrip("/")) is not None


def _with_authorization(scope: Scope) -> Scope:
    """Give a key in `X-Api-Key`, where Anthropic's clients send it, the place where vLLM's own check looks for it."""
    headers = Headers(scope=scope)
    if "authorization" not in headers and (key := headers.get("x-api-key")):
        scope["headers"] = [*scope["headers"], (b"authorization", f"Bearer {key}".encode("latin-1"))]
    return scope


class AuthMiddleware:
    """ASGI middleware: refuses requests without a valid key, and puts the tenant of others in `request.state`.

    Args:
        app: the app behind it.
        keys: the valid keys.
        open_routes: paths that need no key.
    """

    def __init__(self, app: ASGIApp, keys: Keys, open_routes: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open = frozenset(open_routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=_with_authorization(scope))
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        authorization = headers.get("authorization")
        tenant = self._tenant(scope, authorization)
        if tenant is None and path.rstrip("/") not in self._open:
            refusal = _invalid_key()
            try:
                if authorization is not None or ON_BEHALF in scope:
                    await self._keys.look_again()
                    tenant = self._tenant(scope, authorization)
            except Unavailable as error:
                refusal = unavailable(error)
            if tenant is None:
                await self._refuse(refusal, scope, receive, send)
                return
        if tenant is not None:
            scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope, authorization: str | None) -> str | None:
        """Whose request it is. What a tenant has asked for in advance is answered while the tenant has a key."""
        asked_by: str | None = scope.get(ON_BEHALF)
        if asked_by is None:
            return self._keys.tenant(authorization)
        return asked_by if self._keys.knows(asked_by) else None

    async def _refuse(self, error: APIError, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})
            return
        await response(error, scope)(scope, receive, send)


def _invalid_key() -> APIError:
    message = (
        "No valid API key was given: send one that this server knows in the header 'Authorization: Bearer KEY' or "
        "'X-Api-Key: KEY'."
    )
    headers = {"WWW-Authenticate": "Bearer"}
    return APIError(HTTPStatus.UNAUTHORIZED, "invalid_api_key", message, headers=headers)
