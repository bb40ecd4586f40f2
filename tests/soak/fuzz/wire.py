"""One request as bytes on a connection of its own, and what came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Input:
    """A request, sent as it is: nothing is escaped, completed or refused on the way.

    Attributes:
        name: which seed it comes from.
        headers: beside Host, Connection and, unless given, Content-Length.
    """

    name: str
    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def with_body(self, body: bytes) -> Input:
        return replace(self, body=body)

    def wire(self, host: str, key: str) -> bytes:
        headers = {"Host": host, "Connection": "close", "Authorization": f"Bearer {key}", **self.headers}
        if self.body and not any(name.lower() in ("content-length", "transfer-encoding") for name in headers):
            headers["Content-Length"] = str(len(self.body))
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + self.body

    def as_json(self) -> dict[str, Any]:
        """For the corpus; bytes as Latin-1."""
        return {
            "name": self.name,
            "method": self.method,
            "path": self.path,
            "headers": dict(self.headers),
            "body": self.body.decode("latin-1"),
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Input:
        body = line["body"].encode("latin-1")
        return cls(line["name"], line["method"], line["path"], line.get("headers", {}), body)


@dataclass(frozen=True)
class Answer:
    """What came back. `status` 0: the connection ended without an answer, -1: nothing came in time."""

    status: int
    headers: str = ""
    body: str = ""
    seconds: float = 0.0


async def send(port: int, key: str, given: Input, seconds: float) -> Answer:
    """Send one input to a server of this machine and read until it closes the connection."""
    started = time.monotonic()
    try:
        raw = await asyncio.wait_for(_exchange(port, given.wire(f"127.0.0.1:{port}", key)), seconds)
    except TimeoutError:
        return Answer(-1, seconds=time.monotonic() - started)
    head, _, body = raw.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    return Answer(status, head.decode("latin-1"), body.decode("utf-8", "replace"), time.monotonic() - started)


async def _exchange(port: int, request: bytes) -> bytes:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return b""
    answer = b""
    try:
        writer.write(request)
        await writer.drain()
        while piece := await reader.read(1 << 16):
            answer += piece
    except ConnectionError:
        pass  # a server that has answered may close before it has read everything
    finally:
        writer.close()
    return answer
