"""Requests that this server sends to itself: through the same middleware, checks and metrics as a client's."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message

from f2l_vllm.server.tenants import ON_BEHALF

logger = logging.getLogger(__name__)
_LEAVE_SECONDS = 5.0  # for the app to notice that its client is gone


@dataclass
class InwardAnswer:
    """What the app answered; `status` is 0 if it did not."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""

    @property
    def body(self) -> Any:
        """The content's JSON value, or else its text."""
        try:
            return json.loads(self.content)
        except ValueError:
            return self.content.decode(errors="replace")

    @property
    def code(self) -> str | None:
        """The code of an error, if it has one."""
        match self.body:
            case {"error": {"code": str(code)}}:
                return code
        return None


async def post(app: ASGIApp, path: str, tenant: str, content: bytes, headers: Mapping[str, str]) -> InwardAnswer:
    """Ask the app on a tenant's behalf. If the caller is cancelled, the app sees its client go away, and stops."""
    sent = {"host": "localhost", "content-type": "application/json", "content-length": str(len(content)), **headers}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "client": None,
        "server": ("localhost", 80),
        "state": {},
        ON_BEHALF: tenant,
    }
    answer, left = InwardAnswer(), asyncio.Event()
    messages: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await left.wait()
            return {"type": "http.disconnect"}
        return messages.pop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            answer.content += message.get("body", b"")

    asking = asyncio.ensure_future(app(scope, receive, send))
    try:
        await asyncio.wait([asking])
    except asyncio.CancelledError:
        left.set()
        await asyncio.wait([asking], timeout=_LEAVE_SECONDS)
        asking.cancel()
        raise
    if asking.cancelled():  # the server stops
        return InwardAnswer()
    if (error := asking.exception()) is not None:
        logger.error("%s failed", path, exc_info=error)
        return InwardAnswer(HTTPStatus.INTERNAL_SERVER_ERROR)
    return answer
