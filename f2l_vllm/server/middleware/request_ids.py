"""Every request has an id, the client's `X-Request-Id` or a new one: in the log's JSON lines, and in the answer."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from f2l_vllm import logs

HEADER = "x-request-id"
_PLAIN = re.compile(r"[!-~]{1,128}")


class RequestIds:
    """ASGI middleware: the app behind it finds the id in the request's header, and vLLM names its own request after it
    (`chatcmpl-…`). OpenAI's API sends the same header, which its client shows as `_request_id`.

    Args:
        app: the app behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        name = headers.get(HEADER, "")
        if not _PLAIN.fullmatch(name):
            name = headers[HEADER] = uuid.uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        token = logs.request_id.set(name)
        try:
            await self._app(scope, receive, named)
        finally:
            logs.request_id.reset(token)
