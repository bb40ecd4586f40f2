"""Standing questions: each new segment of a stream is asked the same, and the answers go to readers and webhooks.

The server that looks after the streams asks, through the application itself, as a client would. Answers are rows of
the catalog, one of each segment, so any server's readers have them, and a restart neither loses nor doubles one. A
webhook gets them in their order; it may get one twice, with the same id.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp

from f2l_vllm.catalog.stream_tables import PieceRecord, StreamRecord, WatchRecord
from f2l_vllm.server.inward import post
from f2l_vllm.server.streams import pyramid
from f2l_vllm.server.streams.live import LiveStreams
from f2l_vllm.server.streams.webhooks import WebhookError, Webhooks
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.video.errors import VideoError

logger = logging.getLogger(__name__)
_TICK_SECONDS = 0.5
_AT_ONCE = 8  # answers of a watch that are asked for, or sent, before others have their turn
_ROUTE = "/v1/chat/completions"
_PASSING = {"video_not_ready", "stream_is_empty", "catalog_busy", "store_unavailable", "other_models"}
_BUSY = (0, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class Watches:
    """Lives on the API server's event loop.

    Args:
        app: the whole application, which answers as it answers a client.
        keys: those that vLLM's own middleware asks for.
    """

    def __init__(self, live: LiveStreams, app: ASGIApp, keys: Sequence[str] = ()) -> None:
        self._live, self._app, self._catalog = live, app, live.service.catalog
        self._headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
        self._webhooks = Webhooks(live.service.settings.fetch_policy)
        self._asking: dict[str, asyncio.Task[None]] = {}  # by watch
        self._sending: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Ask and send, until cancelled."""
        try:
            while True:
                try:
                    await self.look()
                except Unavailable as error:
                    logger.info("standing questions wait: %s", error)
                except Exception:
                    logger.exception("standing questions wait")
                await asyncio.sleep(_TICK_SECONDS)
        finally:
            for task in [*self._asking.values(), *self._sending.values()]:
                task.cancel()

    async def look(self) -> None:
        """Begin what is to be asked or sent, if this server looks after the streams.

        Raises:
            Unavailable: the catalog cannot be asked.
        """
        if not self._live.has_duty or self._live.service.is_stopping:
            return
        known = {watch.id: (stream, watch) for stream, watch in await asyncio.to_thread(self._catalog.open_watches)}
        for running in (self._asking, self._sending):
            for name in [name for name in running if name not in known]:
                running.pop(name).cancel()
        for stream, watch in known.values():
            if watch.id not in self._asking:
                self._begin(self._asking, watch, self._ask(stream, watch))
            if watch.webhook is not None and watch.id not in self._sending:
                self._begin(self._sending, watch, self._send(watch))

    def _begin(self, running: dict[str, asyncio.Task[None]], watch: WatchRecord, work: Any) -> None:
        task = running[watch.id] = asyncio.create_task(work)

        def ended(task: asyncio.Task[None]) -> None:
            if running.get(watch.id) is task:
                del running[watch.id]
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, Unavailable):
                logger.error("the standing question %s goes on later", watch.id, exc_info=error)

        task.add_done_callback(ended)

    async def _ask(self, stream: StreamRecord, watch: WatchRecord) -> None:
        pieces = await self._live.pieces(stream)
        for piece in pyramid.following(pieces, watch.asked_to)[:_AT_ONCE]:
            answer = await self._answer(stream, watch, piece)
            if answer is None:
                return
            await self._live.service.change(self._catalog.add_watch_answer, watch, piece, json.dumps(answer))

    async def _answer(self, stream: StreamRecord, watch: WatchRecord, piece: PieceRecord) -> dict[str, Any] | None:
        """What an event says of a segment; None: ask again later."""
        event: dict[str, Any] = {
            "id": f"evt_{watch.id.removeprefix('watch_')}_{piece.file_id.removeprefix('file-')}",
            "object": "event",
            "type": "stream.watch.answered",
            "created_at": int(self._catalog.now()),
        }
        said: dict[str, Any] = {
            "stream_id": stream.id,
            "watch_id": watch.id,
            "start": piece.start,
            "end": piece.end,
        }
        if not pyramid.is_ready(piece):
            code, why = (piece.file.error_code, piece.file.error_message) if piece.file is not None else (None, None)
            return {**event, "data": {**said, "answer": None, "error": {"code": code, "message": why}}}
        stretch = {"start": piece.start, "end": piece.end, "wait": "none"}
        body = {**watch.question, "model": stream.id, "f2l": stretch}
        found = await post(self._app, _ROUTE, stream.tenant, json.dumps(body).encode(), self._headers)
        if found.status in _BUSY or found.code in _PASSING:
            return None
        if found.status != HTTPStatus.OK:
            return {**event, "data": {**said, "answer": None, "error": found.body.get("error")}}
        content = found.body["choices"][0]["message"]["content"]
        return {**event, "data": {**said, "answer": content, "f2l": found.body["f2l"], "usage": found.body["usage"]}}

    async def _send(self, watch: WatchRecord) -> None:
        """Send what the webhook does not have, one answer after the other."""
        assert watch.webhook is not None
        assert watch.secret is not None
        for number, text in await asyncio.to_thread(self._catalog.watch_answers, watch.id, watch.sent_to, _AT_ONCE):
            try:
                await self._webhooks.send(watch.webhook, watch.secret, json.loads(text))
            except (WebhookError, VideoError) as error:
                logger.warning("an answer of %s was not taken and stays with its events: %s", watch.id, error)
            await self._live.service.change(self._catalog.note_sent, watch, number)
