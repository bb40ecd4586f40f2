"""The routes under `/v1/files`, `/v1/models` and `/ready`, in OpenAI's shapes.

Source: OpenAI API reference, Files. The object `f2l` inside a file holds what this server adds.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from http import HTTPStatus
from typing import Annotated, Any, BinaryIO, Literal, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from f2l_vllm.catalog.states import IN_WORK, VideoState
from f2l_vllm.catalog.tables import AdapterRecord, FileRecord, FileWithAdapter
from f2l_vllm.hypernetwork.adapter import CONFIG_FILE, named_for
from f2l_vllm.server import errors, vllm_api
from f2l_vllm.server.errors import bad_request, shutting_down, video_not_found
from f2l_vllm.server.tenants import tenant_of
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.server.videos.uploads import inspect, receive
from f2l_vllm.store.store import MANIFEST_FILE, Store, StoreError

router = APIRouter()
_LONGEST_SECONDS = 3600.0
_ERASED_SECONDS = 90.0  # longer than the time after which a silent server counts as gone
_AT_ONCE = 200  # objects of a list that are made at once
_MODELS = 1000  # clients ask for models without paging, and show them to people
_PIECE_BYTES = 1 << 20
_Page = Callable[..., tuple[list[str], list[str], bool]]


def service(request: Request) -> VideoService:
    """The video service of this server."""
    found: VideoService = request.app.state.f2l
    return found


@router.post("/v1/files")
async def create_file(request: Request) -> JSONResponse:
    """Accept a video, as multipart fields: `file`, `purpose` (`vision`), and optionally `expires_after[anchor]`,
    `expires_after[seconds]` and `f2l[pinned]`. Internalization goes on behind; the same bytes are internalized once.
    With the purpose `batch` the file holds the requests of a batch, a JSON object in each line.

    The file's `status` goes from `uploaded` to `processed` or `error`; its object `f2l` says more.
    """
    videos = service(request)
    temporary = videos.store.temporary()
    try:
        upload = await receive(request, temporary, videos.settings, videos.check_room)
        await inspect(temporary, videos.settings, upload.purpose)
        record = await videos.enter(temporary, upload)
    finally:
        videos.store.discard(temporary)
    return await _one(videos, record)


@router.get("/v1/files")
async def list_files(
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Response:
    """The caller's files, newest first, a page at a time."""
    videos, tenant = service(request), tenant_of(request)
    page = functools.partial(_files_page, videos, tenant, descending=order == "desc", purpose=purpose)
    return await _listed(page, after, limit, await asyncio.to_thread(videos.catalog.stored_bytes, tenant))


@router.get("/v1/files/{file_id}")
async def retrieve_file(file_id: str, request: Request) -> JSONResponse:
    """One file."""
    (found,) = await service(request).find([file_id], tenant_of(request))
    return JSONResponse(file_object(found.file, found.adapter, service(request).why_not_ready()))


@router.post("/v1/files/{file_id}")
async def update_file(file_id: str, request: Request) -> JSONResponse:
    """Pin a file, `{"f2l": {"pinned": true}}`, or let it go again: a pinned file does not expire."""
    try:
        match await request.json():
            case {"f2l": {"pinned": bool(pinned)}}:
                videos = service(request)
                return await _one(videos, await videos.pin(file_id, tenant_of(request), pinned))
    except (ValueError, RecursionError):
        pass
    raise bad_request("invalid_request", 'A file is updated by a JSON body like {"f2l": {"pinned": true}}.', "f2l")


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, request: Request, wait: Literal["erased"] | None = None) -> JSONResponse:
    """Delete a file; its adapter and bytes go when no other file shares them and no answer is being written.

    With `wait=erased` it answers when no server has anything left of them, and says whether that was in time.
    """
    videos = service(request)
    doomed = await videos.remove(file_id, tenant_of(request))
    answer: dict[str, Any] = {"id": file_id, "object": "file", "deleted": True}
    if wait is not None:
        answer["f2l"] = {"erased": await videos.forgetting.erased(doomed, _ERASED_SECONDS)}
    return JSONResponse(answer)


@router.get("/v1/files/{file_id}/content")
async def file_content(file_id: str, request: Request) -> FileResponse:
    """The bytes as uploaded."""
    videos = service(request)
    (found,) = await videos.find([file_id], tenant_of(request))
    try:
        return await asyncio.to_thread(_Content, videos, found.file)
    except (FileNotFoundError, StoreError) as error:
        raise video_not_found(file_id) from error  # deleted between look-up and read


class _Content(FileResponse):
    """A video's bytes. The file is opened first, so that it is sent whole even if it is deleted meanwhile."""

    def __init__(self, videos: VideoService, record: FileRecord) -> None:
        """Runs in a thread. Raises as `VideoService.fetch_video`, and FileNotFoundError."""
        self._file = videos.fetch_video(record).open("rb")
        path = f"/dev/fd/{self._file.fileno()}"
        super().__init__(path, media_type="application/octet-stream", filename=record.filename)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


@router.get("/v1/files/{file_id}/events")
async def file_events(file_id: str, request: Request) -> StreamingResponse:
    """Server-sent events with the file object whenever it changes, until it is processed, failed or gone."""
    videos, tenant = service(request), tenant_of(request)
    (first,) = await videos.find([file_id], tenant)

    async def events() -> AsyncIterator[str]:
        found: FileWithAdapter | None = first
        while found is not None:
            yield f"data: {json.dumps(file_object(found.file, found.adapter))}\n\n"
            seen = (found.file.state, found.file.progress)
            if videos.is_stopping or found.file.state not in IN_WORK:
                break
            await asyncio.sleep(videos.watcher.event_seconds)
            progress = await videos.watcher.wait(file_id, _LONGEST_SECONDS, seen)
            if videos.is_stopping:
                break
            if progress is None:  # no longer in work: read the whole file object
                found = (await asyncio.to_thread(videos.catalog.find, [file_id], tenant)).get(file_id)
            else:
                found = FileWithAdapter(replace(found.file, state=progress[0], progress=progress[1]), None)
        unfinished = found is not None and found.file.state in IN_WORK
        yield errors.chunk(shutting_down()) if unfinished else "data: [DONE]\n\n"

    videos.watcher.add_reader(tenant)
    return Events(events(), lambda: videos.watcher.remove_reader(tenant))


class Events(StreamingResponse):
    """Calls `ended` however the stream ends, even if it never began."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


@router.get("/v1/files/{file_id}/adapter")
async def file_adapter(file_id: str, request: Request) -> Response:
    """The PEFT adapter as a tar archive; plain vLLM and peft load what it holds. A damaged one is made again first."""
    videos = service(request)
    wait = 0.0
    while (adapter := (await videos.ready(file_id, tenant_of(request), wait)).adapter) is not None:
        try:
            size, pieces = await asyncio.to_thread(_tar, videos.store, adapter, request.app.state.f2l_base_model)
        except (FileNotFoundError, StoreError) as error:
            if wait:
                raise video_not_found(file_id) from error  # deleted between look-up and read
            await videos.remake(adapter, error)
            wait = videos.settings.wait_seconds
        else:
            headers = {"Content-Disposition": f'attachment; filename="{adapter.name}.tar"', "Content-Length": str(size)}
            return StreamingResponse(pieces, media_type="application/x-tar", headers=headers)
    raise video_not_found(file_id)  # deleted a moment ago


@router.get("/v1/models")
async def list_models(
    request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=_MODELS)] = _MODELS
) -> Response:
    """vLLM's models, the caller's live streams, and the caller's ready videos as models of their own, newest first, a
    page at a time."""
    base = await vllm_api.model_cards(request.app.state)
    streams = functools.partial(service(request).catalog.live_streams, tenant_of(request))
    own = [_model_card(base[0], one.id, one.name, one.created_at) for one in await asyncio.to_thread(streams)]
    page = functools.partial(_models_page, service(request), tenant_of(request), [*base, *own])
    return await _listed(page, after, limit)


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> JSONResponse:
    """One model: one of vLLM's by name, or a ready video or a stream by its id."""
    base = await vllm_api.model_cards(request.app.state)
    for card in base:
        if card["id"] == model:
            return JSONResponse(card)
    videos, tenant = service(request), tenant_of(request)
    if (stream := await asyncio.to_thread(videos.catalog.stream, model, tenant)) is not None:
        return JSONResponse(_model_card(base[0], stream.id, stream.name, stream.created_at))
    file = (await videos.ready(model, tenant, wait=0.0)).file
    return JSONResponse(_model_card(base[0], file.id, file.filename, file.created_at))


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 when the engine answers and a hypernetwork worker is loaded, else 503 with what is missing and why."""
    parts = {
        "engine": await vllm_api.engine_is_healthy(request.app.state.engine_client),
        "workers": service(request).is_ready(),
        "catalog": (behind := service(request).membership.why_not_ready) is None,
    }
    why = {"engine": "the engine has ended"} if not parts["engine"] else {}
    if behind is not None:
        why["catalog"] = behind
    if (reason := service(request).why_not_ready()) is not None:
        why["workers"] = reason
    status = HTTPStatus.OK if all(parts.values()) else HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse({"ready": all(parts.values()), **parts, **({"why": why} if why else {})}, status_code=status)


def file_object(record: FileRecord, adapter: AdapterRecord | None, why: str | None = None) -> dict[str, Any]:
    """A file as the OpenAI API shows it; `f2l` holds stage, progress, and what is known about the adapter.

    Args:
        why: the reason if no worker can take the file up.
    """
    shown = {VideoState.PROCESSED: "processed", VideoState.ERROR: "error"}.get(record.state, "uploaded")
    details: dict[str, Any] = {"stage": record.state.value, "progress": round(record.progress, 3)}
    details |= {
        "sha256": record.sha256,
        "pinned": record.pinned,
        "last_used_at": record.last_used_at and int(record.last_used_at),
    }
    if why is not None and record.state is VideoState.UPLOADED:
        details["waits_for"] = why
    if adapter is not None:
        details |= {"adapter": adapter.name, "rank": adapter.rank, "adapter_bytes": adapter.bytes}
        details |= adapter.info.to_json()
    if record.state is VideoState.ERROR:
        details["error"] = {"code": record.error_code, "message": record.error_message}
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": int(record.created_at),
        "expires_at": None if record.expires_at is None or record.pinned else int(record.expires_at),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": shown,
        "status_details": record.error_message,
        "f2l": details,
    }


async def _one(videos: VideoService, record: FileRecord) -> JSONResponse:
    adapters = await asyncio.to_thread(videos.catalog.adapters_of, [record])
    return JSONResponse(file_object(record, adapters.get(record.adapter_name), videos.why_not_ready()))


async def _listed(page: _Page, after: str | None, limit: int, stored: int | None = None) -> Response:
    """A list in OpenAI's shape, made and sent a few objects at a time. One thread makes all lists, so that long or many
    lists do not hold up answers."""
    run = asyncio.get_running_loop().run_in_executor
    try:
        texts, ids, more = await run(_lister(), functools.partial(page, after=after, limit=min(limit, _AT_ONCE)))
    except KeyError as error:
        raise bad_request("invalid_cursor", f"'after' names no file of yours: {after!r}.", "after") from error

    async def pieces() -> AsyncIterator[str]:
        listed, first, last, follows, left = texts, ids[:1], ids[-1:], more, limit - len(ids)
        yield '{"object":"list","data":[' + ",".join(listed)
        while follows and left > 0:
            rest = functools.partial(page, after=last[0], limit=min(left, _AT_ONCE))
            listed, found, follows = await run(_lister(), rest)
            last, left = found[-1:] or last, left - len(found)
            yield "".join(f",{text}" for text in listed)
        ends: dict[str, Any] = {"first_id": next(iter(first), None), "last_id": next(iter(last), None)}
        ends["has_more"] = follows
        if stored is not None:
            ends["f2l"] = {"stored_bytes": stored}
        yield "]," + json.dumps(ends)[1:]

    return StreamingResponse(pieces(), media_type="application/json")


@cache
def _lister() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "f2l-lists")


def _files_page(
    videos: VideoService, tenant: str, *, after: str | None, limit: int, descending: bool, purpose: str | None
) -> tuple[list[str], list[str], bool]:
    """File objects as JSON, their ids, and whether more follow. Runs in a thread."""
    catalog = videos.catalog
    records, more = catalog.files(tenant, after=after, limit=limit, descending=descending, purpose=purpose)
    adapters = catalog.adapters_of(records)
    shown = [json.dumps(file_object(record, adapters.get(record.adapter_name))) for record in records]
    return shown, [record.id for record in records], more


def _models_page(
    videos: VideoService, tenant: str, base: list[dict[str, Any]], *, after: str | None, limit: int
) -> tuple[list[str], list[str], bool]:
    """Like `_files_page`, for ready videos as models; the first page begins with vLLM's own models."""
    state = VideoState.PROCESSED
    records, more = videos.catalog.files(tenant, after=after, limit=limit, descending=True, state=state)
    own = [] if after is not None else [json.dumps(card) for card in base]
    shown = own + [json.dumps(_model_card(base[0], one.id, one.filename, one.created_at)) for one in records]
    return shown, [record.id for record in records], more


def _model_card(base: dict[str, Any], name: str, title: str, created_at: float) -> dict[str, Any]:
    own = {
        "id": name,
        "name": title,
        "created": int(created_at),
        "root": base["id"],
        "parent": base["id"],
    }
    return {**base, **own, "owned_by": "f2l-vllm"}


def _tar(store: Store, adapter: AdapterRecord, base_model: str) -> tuple[int, Iterator[bytes]]:
    """The archive's length and its pieces. Its config names the base model by a name that the recipient can load. All
    files are opened first, so that the archive is sent whole even if they are deleted meanwhile."""
    directory = store.load_path(adapter.object)
    files: list[tuple[tarfile.TarInfo, BinaryIO]] = []
    for path in sorted(directory.iterdir()):
        if path.name == MANIFEST_FILE:
            continue
        entry, file = tarfile.TarInfo(f"{adapter.name}/{path.name}"), cast(BinaryIO, path.open("rb"))
        status = os.fstat(file.fileno())
        entry.size, entry.mtime = status.st_size, int(status.st_mtime)
        if path.name == CONFIG_FILE:
            with file:
                content = named_for(file.read().decode(), base_model).encode()
            entry.size, file = len(content), io.BytesIO(content)
        files.append((entry, file))
    lengths = [tarfile.BLOCKSIZE * (1 - (-entry.size // tarfile.BLOCKSIZE)) for entry, _ in files]  # header and blocks
    size = -(-(sum(lengths) + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def pieces() -> Iterator[bytes]:
        for entry, file in files:
            with file:
                yield entry.tobuf()
                while piece := file.read(_PIECE_BYTES):
                    yield piece
            yield bytes(-entry.size % tarfile.BLOCKSIZE)
        yield bytes(size - sum(lengths))

    return size, pieces()
