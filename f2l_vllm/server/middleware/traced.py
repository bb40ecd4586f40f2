"""Uploads and questions as spans, `upload` and `answer`."""

from __future__ import annotations

import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from f2l_vllm import logs, tracing

_PATHS = {
    "upload": re.compile("/v1/files|/v1/uploads/[^/]+/complete"),
    "answer": re.compile("/v1/(chat/completions|completions|responses|messages)"),
}


class Traced:
    """ASGI middleware: a span from a request's head to the end of its answer, below the client's own if it sends
    `traceparent`. The app behind it finds the span in that header instead: vLLM's `llm_request` hangs below it.

    Args:
        app: the app behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "") if scope.get("method") == "POST" else ""
        name = next((name for name, paths in _PATHS.items() if paths.fullmatch(path)), None)
        if name is None:
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        with tracing.span(name, headers.get(tracing.HEADER), request_id=logs.request_id.get()) as span:
            if (ours := tracing.traceparent()) is not None:
                headers[tracing.HEADER] = ours

            async def noted(message: Message) -> None:
                if span is not None and message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            await self._app(scope, receive, noted)
