"""The routes under `/v1/streams`: live video, read as it comes and asked at any moment by its id as the model."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from f2l_vllm.catalog.stream_tables import PieceRecord, StreamRecord, StreamState
from f2l_vllm.server import errors
from f2l_vllm.server.errors import APIError, bad_request, shutting_down
from f2l_vllm.server.streams import pyramid, segments
from f2l_vllm.server.streams.live import LiveStreams, stream_ended
from f2l_vllm.server.streams.segments import Kind
from f2l_vllm.server.tenants import tenant_of
from f2l_vllm.server.videos.part_routes import ExpiresAfter
from f2l_vllm.server.videos.routes import Events, router
from f2l_vllm.server.videos.uploads import expiry_of, receive_body, shown_name
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.pull import check_address

__all__ = ["router"]

_EVENT_SECONDS = 0.5
_Short = Annotated[str, Field(max_length=64)]
_Long = Annotated[str, Field(max_length=512)]


class NewStream(BaseModel):
    """A stream that is going to come."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("", max_length=256)
    segment_seconds: float = Field(10.0, ge=1, le=600, description="How long its segments are, about.")
    window_seconds: float = Field(60.0, ge=1, le=86400, description="What a question is about that names no stretch.")
    keep_seconds: float | None = Field(
        None, ge=1, description="What is older is dropped. Default: what is old is read ever more coarsely."
    )
    idle_seconds: float = Field(600.0, ge=10, le=86400, description="Without a segment for so long, it ends.")
    on_end: Literal["file", "delete"] = Field("file", description="What becomes of it when it ends.")
    source: str | None = Field(
        None,
        max_length=2048,
        description="An address to pull it from: rtsp, rtsps, srt, or http(s) of an HLS playlist.",
    )
    expires_after: ExpiresAfter | None = Field(None, description="When the file expires that it becomes.")
    metadata: dict[_Short, _Long] | None = Field(None, max_length=16)


def live(request: Request) -> LiveStreams:
    """The live streams of this server."""
    found: LiveStreams = request.app.state.f2l_streams
    return found


@router.post("/v1/streams")
async def create_stream(given: NewStream, request: Request) -> dict[str, Any]:
    """Begin a live stream. Its segments are pushed by HTTP PUT under its `push_url`, or pulled from `source`. Its id is
    the `model` of questions about it."""
    streams, tenant = live(request), tenant_of(request)
    after = given.expires_after
    expires_seconds, _ = expiry_of(after and after.anchor, after and after.seconds)
    if given.keep_seconds is not None and given.keep_seconds < given.window_seconds:
        message = "keep_seconds must be at least window_seconds: a question is about the whole window."
        raise bad_request("invalid_request", message, "keep_seconds")
    if given.source is not None:
        try:
            check_address(given.source)
        except VideoError as error:
            raise bad_request(error.code, error.message, "source") from None
    values = {
        "name": shown_name(given.name) if given.name else "",
        "segment_seconds": given.segment_seconds,
        "window_seconds": given.window_seconds,
        "keep_seconds": given.keep_seconds,
        "idle_seconds": given.idle_seconds,
        "expires_seconds": expires_seconds,
        "becomes_file": given.on_end == "file",
        "source": given.source,
        "details": {"metadata": given.metadata},
    }
    return stream_object(await streams.begin(tenant, values), [], streams, request)


@router.get("/v1/streams")
async def list_streams(
    request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """The caller's streams, newest first, a page at a time."""
    streams, tenant = live(request), tenant_of(request)
    catalog = streams.service.catalog
    try:
        found, more = await asyncio.to_thread(functools.partial(catalog.streams, tenant, after=after, limit=limit))
    except KeyError as error:
        raise bad_request("invalid_cursor", f"'after' names no stream of yours: {after!r}.", "after") from error
    shown = [stream_object(one, await streams.pieces(one), streams, request) for one in found]
    ends = {"first_id": found[0].id if found else None, "last_id": found[-1].id if found else None}
    return {"object": "list", "data": shown, **ends, "has_more": more}


@router.get("/v1/streams/{stream_id}")
async def retrieve_stream(stream_id: str, request: Request) -> dict[str, Any]:
    """One stream: what was read of it, and how fresh that is."""
    streams = live(request)
    stream = await streams.find(stream_id, tenant_of(request))
    return stream_object(stream, await streams.pieces(stream), streams, request)


@router.post("/v1/streams/{stream_id}/end")
async def end_stream(stream_id: str, request: Request) -> dict[str, Any]:
    """End a stream. With `on_end` `file` it becomes an ordinary file, its `file_id`, with its segments as chapters."""
    streams = live(request)
    stream = await streams.end(await streams.find(stream_id, tenant_of(request)))
    return stream_object(stream, await streams.pieces(stream), streams, request)


@router.delete("/v1/streams/{stream_id}")
async def delete_stream(stream_id: str, request: Request) -> dict[str, Any]:
    """Delete a stream with everything that was read of it. A file that it has become stays."""
    streams = live(request)
    await streams.remove(await streams.find(stream_id, tenant_of(request)))
    return {"id": stream_id, "object": "stream", "deleted": True}


@router.get("/v1/streams/{stream_id}/events")
async def stream_events(stream_id: str, request: Request) -> StreamingResponse:
    """Server-sent events with the stream object whenever it changes, until it has ended or is gone."""
    streams, tenant = live(request), tenant_of(request)
    watcher = streams.service.watcher
    await streams.find(stream_id, tenant)

    async def events() -> AsyncIterator[str]:
        last = None
        while not streams.service.is_stopping:
            try:
                stream = await streams.find(stream_id, tenant)
            except APIError:
                break
            shown = stream_object(stream, await streams.pieces(stream), streams, request)
            known = json.dumps({**shown, "f2l": {**shown["f2l"], "age_seconds": None}})
            if known != last:
                yield f"data: {json.dumps(shown)}\n\n"
                last = known
            if stream.state is StreamState.ENDED and not shown["f2l"]["pieces"]:
                break
            await asyncio.sleep(max(_EVENT_SECONDS, watcher.event_seconds))
        yield errors.chunk(shutting_down()) if streams.service.is_stopping else "data: [DONE]\n\n"

    watcher.add_reader(tenant)
    return Events(events(), lambda: watcher.remove_reader(tenant))


@router.put("/v1/streams/{stream_id}/push/{name:path}")
@router.post("/v1/streams/{stream_id}/push/{name:path}")
async def push(stream_id: str, name: str, request: Request) -> JSONResponse:
    """Take a segment (MPEG-TS, MP4, or a fragment of one), the header of fragments, or a playlist, as HLS senders put
    them: `ffmpeg -f hls -method PUT`. A segment counts as it comes; a playlist with its end ends the stream."""
    streams, tenant = live(request), tenant_of(request)
    async with streams.turn(tenant, stream_id) as my_turn:  # at once: requests that came later get theirs later
        stream = await streams.find(stream_id, tenant)
        if stream.source is not None:
            message = f"The stream '{stream_id}' is pulled from its source: push to another."
            raise bad_request("stream_is_pulled", message)
        if stream.state is StreamState.ENDED and (stream.file_id is not None or not stream.becomes_file):
            raise stream_ended(stream)
        return await _take(streams, stream, name, request, my_turn)


async def _take(
    streams: LiveStreams, stream: StreamRecord, name: str, request: Request, my_turn: Callable[[], Awaitable[None]]
) -> JSONResponse:
    store, settings = streams.service.store, streams.service.settings
    temporary = store.temporary()
    try:
        size, sha256 = await receive_body(request, temporary, settings.max_upload_bytes, streams.service.check_room)
        if not size:
            raise bad_request("empty_file", "The segment is empty: send its bytes in the body.")
        kind = await asyncio.to_thread(segments.kind_of, temporary)
        if kind is Kind.PLAYLIST:
            if await asyncio.to_thread(segments.ends, temporary):
                await streams.end(stream)
            return JSONResponse({"stream_id": stream.id, "kind": kind.value})
        if kind is Kind.INIT:
            await _keep_init(streams, stream, temporary, size)
            return JSONResponse({"stream_id": stream.id, "kind": kind.value})
        if kind is Kind.FRAGMENT:
            await my_turn()  # its header may have been on its way
            stream = await streams.find(stream.id, stream.tenant)
            size, sha256 = await asyncio.to_thread(_with_init, stream, temporary)
        await my_turn()
        piece, is_new = await streams.add(stream, name[:512], temporary, size, sha256)
    finally:
        await asyncio.to_thread(store.discard, temporary)
    answer = {"stream_id": stream.id, "kind": Kind.SEGMENT.value, "repeated": not is_new}
    return JSONResponse(
        {**answer, "start": piece.start, "end": piece.end}, HTTPStatus.CREATED if is_new else HTTPStatus.OK
    )


@router.delete("/v1/streams/{stream_id}/push/{name:path}")
async def forget_segment(stream_id: str, name: str, request: Request) -> dict[str, Any]:
    """What senders ask for segments that have left their playlist. The stream keeps what it has read as it was told to
    when it began."""
    await live(request).find(stream_id, tenant_of(request))
    return {"stream_id": stream_id, "name": name}


def stream_object(
    stream: StreamRecord, pieces: Sequence[PieceRecord], streams: LiveStreams, request: Request
) -> dict[str, Any]:
    """A stream as clients see it. `f2l` holds what was read of it. Times are Unix seconds."""
    ready = [piece for piece in pieces if pyramid.is_ready(piece)]
    newest = max((piece.end for piece in ready), default=None)
    now = streams.service.catalog.now()
    details: dict[str, Any] = {
        "segments": stream.segments,
        "started_at": stream.origin,
        "head": stream.head,
        "covered": [[round(start, 3), round(end, 3)] for start, end in pyramid.covered(ready)],
        "age_seconds": None if newest is None else round(max(0.0, now - newest), 3),
        "behind_seconds": 0.0 if newest is None or stream.head is None else round(stream.head - newest, 3),
        "reading": "coarse" if pyramid.is_behind(pieces) else "fine",
        "pieces": len(pieces),
        "in_work": sum(pyramid.is_in_work(piece) for piece in pieces) + len(streams.to_make(stream, pieces)),
        "failed": [
            {"start": piece.start, "end": piece.end, "code": piece.file.error_code, "message": piece.file.error_message}
            for piece in pieces
            if piece.file is not None and not pyramid.is_ready(piece) and not pyramid.is_in_work(piece)
        ],
        "timeline": [[piece.level, round(piece.start, 3), round(piece.end, 3), _standing(piece)] for piece in pieces],
        **{name: stream.details[name] for name in ("source", "chapters") if name in stream.details},
    }
    return {
        "id": stream.id,
        "object": "stream",
        "created_at": int(stream.created_at),
        "ended_at": None if stream.ended_at is None else int(stream.ended_at),
        "name": stream.name,
        "status": stream.state.value,
        "segment_seconds": stream.segment_seconds,
        "window_seconds": stream.window_seconds,
        "keep_seconds": stream.keep_seconds,
        "idle_seconds": stream.idle_seconds,
        "on_end": "file" if stream.becomes_file else "delete",
        "source": stream.source,
        "push_url": None if stream.source else f"{str(request.base_url).rstrip('/')}/v1/streams/{stream.id}/push/",
        "file_id": stream.file_id,
        "metadata": stream.details.get("metadata"),
        "f2l": details,
    }


def _standing(piece: PieceRecord) -> str:
    return "ready" if pyramid.is_ready(piece) else "reading" if pyramid.is_in_work(piece) else "failed"


async def _keep_init(streams: LiveStreams, stream: StreamRecord, path: Path, size: int) -> None:
    if size > segments.LONGEST_INIT:
        message = f"The header of the stream's fragments has {size} bytes, and {segments.LONGEST_INIT} are accepted."
        raise APIError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "file_too_large", message)
    await streams.service.change(
        streams.service.catalog.note_stream, stream, init=await asyncio.to_thread(path.read_bytes)
    )


def _with_init(stream: StreamRecord, path: Path) -> tuple[int, str]:
    """Put the stream's header before a fragment, which is no video without it. Runs in a thread."""
    if stream.init is None:
        message = "A fragment of MP4 needs its header: put the initialization segment (EXT-X-MAP) first."
        raise APIError(HTTPStatus.CONFLICT, "init_segment_missing", message)
    whole = stream.init + path.read_bytes()
    path.write_bytes(whole)
    return len(whole), hashlib.sha256(whole).hexdigest()
