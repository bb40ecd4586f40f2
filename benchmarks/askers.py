"""Clients that ask a service of fake engines all the time, and how their questions ended."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

_SHORT: dict[str, Any] = {"first_ms": 500, "max_tokens": 5, "ms": 40}
_LONG: dict[str, Any] = {"max_tokens": 200, "ms": 100}
_LONG_EVERY_SECONDS = 4.0
_PATIENCE_SECONDS = 60.0
_VIDEOS = 30


@dataclass
class Asked:
    """One question. `how` it ended: `whole`, the code of an error, or what broke."""

    began: float
    is_stream: bool
    first: float | None = None
    ended: float | None = None
    how: str = ""


class Askers:
    """`rate` short questions a second, every other one streamed, and a stream of 20 s every 4 s."""

    def __init__(self, url: str, rate: float) -> None:
        self._url, self._rate = url, rate
        self.asked: list[Asked] = []

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Ask until the block ends."""
        # A connection for each question, as from many clients.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=_PATIENCE_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
            loops = [
                asyncio.create_task(self._every(http, 1 / self._rate, _SHORT)),
                asyncio.create_task(self._every(http, _LONG_EVERY_SECONDS, _LONG)),
            ]
            try:
                yield
            finally:
                for loop in loops:
                    loop.cancel()

    async def settled(self) -> None:
        """Wait until all that has been asked so far has ended."""
        now = list(self.asked)
        while any(one.ended is None for one in now):
            await asyncio.sleep(0.1)

    def outcome(self, began: float) -> dict[str, Any]:
        """How the questions ended that were in work at this moment, or were asked later."""
        concerned = [one for one in self.asked if one.ended is not None and one.ended >= began]
        failed = [one for one in concerned if one.how != "whole" and one.first is None]
        cut = [one for one in concerned if one.how != "whole" and one.first is not None]
        waits = [(one.first or one.ended or 0.0) - one.began for one in concerned if one.began > began - 1]
        return {
            "asked": len(concerned),
            "failed": dict(Counter(one.how for one in failed)),
            "streams_cut": dict(Counter(one.how for one in cut)),
            "cut_after_s": sorted(round((one.ended or 0.0) - began, 1) for one in cut),
            "longest_to_first_byte_s": round(max(waits), 1),
        }

    async def _every(self, http: aiohttp.ClientSession, seconds: float, answer: dict[str, Any]) -> None:
        async with asyncio.TaskGroup() as questions:
            for number in itertools.count():
                is_stream = answer is _LONG or bool(number % 2)
                question = {"model": f"file-{number % _VIDEOS}", "messages": [], "stream": is_stream, **answer}
                questions.create_task(self._ask(http, question))
                await asyncio.sleep(seconds)

    async def _ask(self, http: aiohttp.ClientSession, question: dict[str, Any]) -> None:
        asked = Asked(time.monotonic(), question["stream"])
        self.asked.append(asked)
        text = b""
        try:
            async with http.post(f"{self._url}/v1/chat/completions", json=question) as answer:
                async for piece in answer.content.iter_any():
                    asked.first = asked.first or time.monotonic()
                    text += piece
                asked.how = _end(answer.status, text, asked.is_stream)
                if answer.status != 200:
                    asked.first = None  # an error is no answer
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            asked.how = type(error).__name__
        asked.ended = time.monotonic()


def _end(status: int, text: bytes, is_stream: bool) -> str:
    if status != 200:
        return f"{status} {text[:80].decode(errors='replace')}"
    if not is_stream:
        return "whole"
    last = text.decode().rstrip("\n").rpartition("\n")[2].removeprefix("data: ")
    try:
        return "whole" if last == "[DONE]" else str(json.loads(last)["error"]["code"])
    except (ValueError, KeyError):
        return "no error chunk"
