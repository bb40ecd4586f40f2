"""The routes under `/console` that need a key: what the page shows and the Files API does not tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse

from f2l_vllm.catalog.states import IN_WORK, VideoState
from f2l_vllm.catalog.tables import FileRecord
from f2l_vllm.server.console.pages import ROOT, Pages
from f2l_vllm.server.console.previews import POSTER, STRIP, Preview, Previews
from f2l_vllm.server.errors import APIError, shutting_down, video_failed, video_not_found, video_not_ready
from f2l_vllm.server.streams.live import LiveStreams, stream_is_empty
from f2l_vllm.server.tenants import tenant_of
from f2l_vllm.server.videos.routes import file_object, service
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.store.store import StoreError
from f2l_vllm.video.errors import VideoError

router = APIRouter(prefix=ROOT)
_BUSY_SECONDS, _IDLE_SECONDS = 0.25, 1.0  # between two looks at the catalog
_AT_ONCE = 500  # files in work that one stream follows
_SECONDS_HEADER = "X-F2L-Seconds"
_KIND = "image/webp"


def attach(app: FastAPI, pages: Pages) -> list[str]:
    """Add the page and its routes to an app. Returns their paths."""
    app.include_router(router)
    for path in pages.paths:
        app.add_api_route(path, pages.answer, methods=["GET", "HEAD"], include_in_schema=False)
    return [*pages.paths, *(route.path for route in router.routes if isinstance(route, APIRoute))]


@router.get("/about")
async def about(request: Request) -> JSONResponse:
    """What the page has to know of this server: its model, limits and sizes."""
    facts: dict[str, Any] = request.app.state.f2l_about
    return JSONResponse(facts)


async def _reader(request: Request) -> AsyncIterator[tuple[VideoService, str]]:
    """Counts the reader of a stream before it begins, and until it has ended."""
    videos, tenant = service(request), tenant_of(request)
    videos.watcher.add_reader(tenant)
    try:
        yield videos, tenant
    finally:
        videos.watcher.remove_reader(tenant)


@router.get("/events", response_class=EventSourceResponse)
async def events(reader: Annotated[tuple[VideoService, str], Depends(_reader)]) -> AsyncIterable[dict[str, Any]]:
    """The caller's files as they make progress, in one stream: a browser has few connections to a host.

    Each event holds `files`, whole file objects of those that came or whose work has ended; `progress`, stage and
    progress of others by id; `gone`, the ids of those deleted meanwhile; and `waits_for` while no worker is alive.
    """
    videos, tenant = reader
    seen: dict[str, tuple[VideoState, float]] = {}
    since: int | None = None
    said: str | None = None
    first = True
    while not videos.is_stopping:
        try:
            found, now = await asyncio.to_thread(videos.catalog.in_work, tenant, since, _AT_ONCE)
            whole = [*(found.keys() - seen.keys()), *(seen.keys() - found.keys())]
            files = await asyncio.to_thread(videos.catalog.find, whole, tenant) if whole else {}
        except Unavailable:
            await asyncio.sleep(_IDLE_SECONDS)
            continue
        since = now
        why = videos.why_not_ready()
        news = {
            "files": [file_object(one.file, one.adapter, why) for one in files.values()],
            "progress": {
                file_id: [state.value, round(progress, 3)]
                for file_id, (state, progress) in found.items()
                if file_id in seen and seen[file_id] != (state, progress)
            },
            "gone": [file_id for file_id in whole if file_id not in files],
            "waits_for": why,
        }
        if first or why != said or news["files"] or news["progress"] or news["gone"]:
            yield news
        first, said = False, why
        # What has ended was sent whole; it does not come back unless it is new.
        seen = {
            file_id: one
            for file_id, one in found.items()
            if one[0] in IN_WORK and (file_id not in whole or file_id in files)
        }
        await asyncio.sleep(max(_BUSY_SECONDS if seen else _IDLE_SECONDS, videos.watcher.event_seconds))
    error = shutting_down()
    yield {"error": {"code": error.code, "message": error.message}}


@router.get("/files/{file_id}/poster")
async def poster(file_id: str, request: Request) -> Response:
    """One frame of a video, small, as WebP."""
    (found,) = await service(request).find([file_id], tenant_of(request))
    return _picture(await _preview(request, found.file, POSTER, ()))


@router.get("/files/{file_id}/strip")
async def strip(file_id: str, request: Request) -> Response:
    """Frames that the model read, side by side, as WebP; the header `X-F2L-Seconds` says when each is shown."""
    videos, tenant = service(request), tenant_of(request)
    (found,) = await videos.find([file_id], tenant)
    if found.adapter is None or not found.adapter.info.timestamps:
        if found.file.state is VideoState.ERROR:
            raise video_failed(file_id, found.file.error_code, found.file.error_message)
        raise video_not_ready(file_id, found.file.state, 0.0, videos.why_not_ready())
    return _picture(await _preview(request, found.file, STRIP, found.adapter.info.timestamps))


@router.get("/streams/{stream_id}/picture")
async def picture(stream_id: str, request: Request) -> Response:
    """A frame of the newest segment of a stream, small, as WebP."""
    streams: LiveStreams = request.app.state.f2l_streams
    stream = await streams.find(stream_id, tenant_of(request))
    pieces = sorted(await streams.pieces(stream), key=lambda piece: (piece.end, -piece.level))
    files = [piece.file for piece in pieces if piece.file is not None and piece.file.state is not VideoState.ERROR]
    if not files:
        raise stream_is_empty(stream)
    return _picture(await _preview(request, files[-1], POSTER, ()))


async def _preview(request: Request, record: FileRecord, kind: str, timestamps: tuple[float, ...]) -> Preview:
    videos = service(request)
    previews: Previews = request.app.state.f2l_previews
    try:
        if (known := previews.kept(record.video, kind)) is not None:
            return known
        path = await asyncio.to_thread(videos.fetch_video, record)
        made = await previews.make(record.video, kind, path, timestamps, record.tenant)
        if not await asyncio.to_thread(videos.catalog.named, [record.video]):
            previews.forget(record.video)  # deleted while its picture was made
        return made
    except VideoError as error:
        raise APIError(HTTPStatus.UNPROCESSABLE_ENTITY, "no_preview", _NO_PREVIEW.format(error.message)) from error
    except (FileNotFoundError, StoreError) as error:
        raise video_not_found(record.id) from error


_NO_PREVIEW = "No picture of this video can be made: {}"


def _picture(made: Preview) -> Response:
    seconds = ",".join(f"{second:.3f}" for second in made.seconds)
    headers = {"Cache-Control": "private, no-store", _SECONDS_HEADER: seconds, "X-Content-Type-Options": "nosniff"}
    return Response(made.picture, media_type=_KIND, headers=headers)
