"""The routes under `/v1/streams/{id}/watches`: the same question of each new segment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from f2l_vllm.catalog.stream_tables import StreamRecord, WatchRecord
from f2l_vllm.catalog.streams import TooManyStreams
from f2l_vllm.server import errors
from f2l_vllm.server.errors import APIError, bad_request, shutting_down
from f2l_vllm.server.streams.routes import live, router
from f2l_vllm.server.streams.webhooks import new_secret
from f2l_vllm.server.tenants import tenant_of
from f2l_vllm.server.videos.routes import Events

__all__ = ["router"]

_MOST = 16  # watches of a stream
_AT_ONCE = 100
_EVENT_SECONDS = 0.5
_QUESTION_BYTES = 65536
_OURS = {"model", "f2l", "stream", "stream_options", "n"}


class NewWatch(BaseModel):
    """A standing question."""

    model_config = ConfigDict(extra="forbid")

    question: str | None = Field(None, min_length=1, max_length=8192, description="What to ask, as a text.")
    request: dict[str, Any] | None = Field(
        None, description="Or the fields of a chat completion (messages, response_format, max_tokens …) without model."
    )
    webhook_url: str | None = Field(None, max_length=2048, description="Where to send the answers, besides the events.")


@router.post("/v1/streams/{stream_id}/watches")
async def create_watch(stream_id: str, given: NewWatch, request: Request) -> dict[str, Any]:
    """Ask each segment that comes from here on the same. The answers are events, and go to the webhook if there is one,
    signed with the `secret` that only this answer shows (https://www.standardwebhooks.com)."""
    streams = live(request)
    stream = await streams.find(stream_id, tenant_of(request))
    if (given.question is None) == (given.request is None):
        raise bad_request("invalid_request", "A watch takes one of 'question' and 'request'.", "question")
    asked = given.request or {"messages": [{"role": "user", "content": given.question}]}
    if unknown := sorted(_OURS & asked.keys()):
        raise bad_request(
            "invalid_request", f"The request of a watch has no field '{unknown[0]}': leave it out.", "request"
        )
    if not isinstance(asked.get("messages"), list) or len(json.dumps(asked)) > _QUESTION_BYTES:
        message = f"The request of a watch needs 'messages', and has {_QUESTION_BYTES} bytes at most."
        raise bad_request("invalid_request", message, "request")
    if given.webhook_url is not None and not given.webhook_url.lower().startswith(("https://", "http://")):
        raise bad_request(
            "invalid_url", "A webhook has an address that begins with https:// or http://.", "webhook_url"
        )
    secret = new_secret() if given.webhook_url is not None else None
    try:
        watch = await streams.service.change(
            streams.service.catalog.add_watch, stream, asked, given.webhook_url, secret, limit=_MOST
        )
    except TooManyStreams as error:
        message = f"The stream has {_MOST} watches: delete one of them."
        raise APIError(HTTPStatus.TOO_MANY_REQUESTS, "too_many_streams", message) from error
    return {**watch_object(watch), "secret": secret}


@router.get("/v1/streams/{stream_id}/watches")
async def list_watches(stream_id: str, request: Request) -> dict[str, Any]:
    """The stream's watches, oldest first."""
    stream = await live(request).find(stream_id, tenant_of(request))
    found = await asyncio.to_thread(live(request).service.catalog.watches, stream.id)
    return {"object": "list", "data": [watch_object(watch) for watch in found], "has_more": False}


@router.delete("/v1/streams/{stream_id}/watches/{watch_id}")
async def delete_watch(stream_id: str, watch_id: str, request: Request) -> dict[str, Any]:
    """Ask it no more, and forget its answers."""
    _, watch = await _find(stream_id, watch_id, request)
    await live(request).service.change(live(request).service.catalog.remove_watch, watch)
    return {"id": watch_id, "object": "stream.watch", "deleted": True}


@router.get("/v1/streams/{stream_id}/watches/{watch_id}/answers")
async def watch_answers(
    stream_id: str,
    watch_id: str,
    request: Request,
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=_AT_ONCE)] = _AT_ONCE,
) -> dict[str, Any]:
    """The answers behind this number, oldest first. The last thousand are kept."""
    _, watch = await _find(stream_id, watch_id, request)
    found = await asyncio.to_thread(live(request).service.catalog.watch_answers, watch.id, after, limit)
    return {
        "object": "list",
        "data": [json.loads(text) for _, text in found],
        "last": found[-1][0] if found else after,
        "has_more": len(found) == limit,
    }


@router.get("/v1/streams/{stream_id}/watches/{watch_id}/events")
async def watch_events(stream_id: str, watch_id: str, request: Request) -> StreamingResponse:
    """Server-sent events with each answer, from the oldest that is kept or from the header `Last-Event-ID`, until the
    stream has ended and all is answered, or the watch is gone."""
    streams, catalog = live(request), live(request).service.catalog
    tenant, watcher = tenant_of(request), live(request).service.watcher
    await _find(stream_id, watch_id, request)
    last_id = request.headers.get("last-event-id", "0")
    first = int(last_id) if last_id.isascii() and last_id.isdecimal() and len(last_id) < 19 else 0

    async def events() -> AsyncIterator[str]:
        last = first
        while not streams.service.is_stopping:
            try:
                stream, _ = await _find(stream_id, watch_id, request)
            except APIError:
                break
            has_pieces = bool(await streams.pieces(stream))
            found = await asyncio.to_thread(catalog.watch_answers, watch_id, last, _AT_ONCE)
            for number, text in found:
                last = number
                yield f"id: {number}\ndata: {text}\n\n"
            if stream.ended_at is not None and not has_pieces and not found:
                break
            await asyncio.sleep(max(_EVENT_SECONDS, watcher.event_seconds))
        yield errors.chunk(shutting_down()) if streams.service.is_stopping else "data: [DONE]\n\n"

    watcher.add_reader(tenant)
    return Events(events(), lambda: watcher.remove_reader(tenant))


def watch_object(watch: WatchRecord) -> dict[str, Any]:
    """A watch as clients see it."""
    return {
        "id": watch.id,
        "object": "stream.watch",
        "created_at": int(watch.created_at),
        "stream_id": watch.stream,
        "request": watch.question,
        "webhook_url": watch.webhook,
    }


async def _find(stream_id: str, watch_id: str, request: Request) -> tuple[StreamRecord, WatchRecord]:
    streams = live(request)
    stream = await streams.find(stream_id, tenant_of(request))
    for watch in await asyncio.to_thread(streams.service.catalog.watches, stream.id):
        if watch.id == watch_id:
            return stream, watch
    message = f"The stream has no watch '{watch_id[:80]}': GET /v1/streams/{stream_id}/watches lists those it has."
    raise APIError(HTTPStatus.NOT_FOUND, "watch_not_found", message)
