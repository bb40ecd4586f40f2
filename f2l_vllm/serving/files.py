"""The routes under `/v1/files`, `/v1/models` and `/ready`, in OpenAI's shapes.

Source: OpenAI API reference, Files. The object `f2l` inside a file holds what this server adds.
"""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from f2l_vllm.adapters.states import IN_WORK, VideoState
from f2l_vllm.adapters.store import MANIFEST_FILE, Store, StoreError
from f2l_vllm.adapters.tables import AdapterRecord, FileRecord, Found
from f2l_vllm.hypernetwork.adapter import CONFIG_FILE, named_for
from f2l_vllm.serving import compat, errors
from f2l_vllm.serving.errors import bad_request, shutting_down, video_not_found
from f2l_vllm.serving.service import VideoService
from f2l_vllm.serving.tenants import tenant_of
from f2l_vllm.serving.uploads import inspect, receive

router = APIRouter()
_EVENT_SECONDS = 0.1


def service(request: Request) -> VideoService:
    """The video service of this server."""
    found: VideoService = request.app.state.f2l
    return found


@router.post("/v1/files")
async def create_file(request: Request) -> JSONResponse:
    """Accept a video; internalization goes on behind."""
    videos = service(request)
    temporary = videos.store.temporary()
    try:
        upload = await receive(request, temporary, videos.settings)
        await inspect(temporary, videos.settings)
        record = await videos.enter(
            temporary,
            tenant=tenant_of(request),
            sha256=upload.sha256,
            size=upload.bytes,
            filename=upload.filename,
            purpose=upload.purpose,
            expires_at=upload.expires_at,
            idle_seconds=upload.idle_seconds,
            pinned=upload.pinned,
        )
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
) -> JSONResponse:
    """The caller's files, newest first, a page at a time."""
    videos = service(request)
    try:
        data, more = await asyncio.to_thread(_page, videos, tenant_of(request), after, limit, order == "desc", purpose)
    except KeyError as error:
        raise bad_request("invalid_cursor", f"'after' names no file of yours: {after!r}.", "after") from error
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": more})


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
async def delete_file(file_id: str, request: Request) -> JSONResponse:
    """Delete a file; its adapter and bytes go when no other file shares them and no answer is being written."""
    await service(request).remove(file_id, tenant_of(request))
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


@router.get("/v1/files/{file_id}/content")
async def file_content(file_id: str, request: Request) -> FileResponse:
    """The bytes as uploaded."""
    videos = service(request)
    (found,) = await videos.find([file_id], tenant_of(request))
    try:
        path = await asyncio.to_thread(videos.store.fetch_video, found.file.sha256)
    except StoreError as error:
        raise video_not_found(file_id) from error  # deleted between look-up and read
    return FileResponse(path, media_type="application/octet-stream", filename=found.file.filename)


@router.get("/v1/files/{file_id}/events")
async def file_events(file_id: str, request: Request) -> StreamingResponse:
    """Server-sent events with the file object whenever it changes, until it is processed, failed or gone."""
    videos = service(request)
    tenant = tenant_of(request)
    (first,) = await videos.find([file_id], tenant)

    async def events() -> AsyncIterator[str]:
        found: Found | None = first
        last = None
        while not videos.is_stopping and found is not None:
            if (found.file.state, found.file.progress) != last:
                last = (found.file.state, found.file.progress)
                yield f"data: {json.dumps(file_object(found.file, found.adapter))}\n\n"
            if found.file.state not in IN_WORK:
                break
            await asyncio.sleep(_EVENT_SECONDS)
            found = (await asyncio.to_thread(videos.catalog.find, [file_id], tenant)).get(file_id)
        unfinished = found is not None and found.file.state in IN_WORK
        yield errors.chunk(shutting_down()) if unfinished else "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@router.get("/v1/files/{file_id}/adapter")
async def file_adapter(file_id: str, request: Request) -> Response:
    """The PEFT adapter as a tar archive; plain vLLM and peft load what it holds. A damaged one is made again first."""
    videos = service(request)
    archive, wait = None, 0.0
    while archive is None:
        found = await videos.ready(file_id, tenant_of(request), wait)
        name = found.file.adapter_name
        try:
            archive = await asyncio.to_thread(_tar, videos.store, name, request.app.state.f2l_base_model)
        except (FileNotFoundError, StoreError) as error:
            if found.adapter is None or wait:
                raise video_not_found(file_id) from error  # deleted between look-up and read
            await videos.remake(found.adapter, error)
            wait = videos.settings.wait_seconds
    disposition = f'attachment; filename="{name}.tar"'
    return Response(archive, media_type="application/x-tar", headers={"Content-Disposition": disposition})


@router.get("/v1/models")
async def list_models(request: Request) -> JSONResponse:
    """vLLM's models, and every ready video of the caller as a model of its own."""
    videos = service(request)
    tenant = tenant_of(request)
    base = await compat.model_cards(request.app.state)

    def cards() -> list[dict[str, Any]]:
        records, _ = videos.catalog.files(tenant, after=None, limit=1 << 20, descending=False)
        return [_model_card(base[0], record) for record in records if record.state is VideoState.PROCESSED]

    return JSONResponse({"object": "list", "data": base + await asyncio.to_thread(cards)})


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> JSONResponse:
    """One model: one of vLLM's by name, or a ready video by its file id."""
    base = await compat.model_cards(request.app.state)
    for card in base:
        if card["id"] == model:
            return JSONResponse(card)
    return JSONResponse(_model_card(base[0], (await service(request).ready(model, tenant_of(request), wait=0.0)).file))


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 when the engine answers and a hypernetwork worker is loaded, else 503 with what is missing and why."""
    parts = {
        "engine": await compat.engine_is_healthy(request.app.state.engine_client),
        "workers": service(request).is_ready(),
    }
    why = {"engine": "the engine has ended"} if not parts["engine"] else {}
    if (reason := service(request).why_not_ready()) is not None:
        why["workers"] = reason
    status = HTTPStatus.OK if all(parts.values()) else HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse({"ready": all(parts.values()), **parts, **({"why": why} if why else {})}, status_code=status)


def file_object(record: FileRecord, adapter: AdapterRecord | None, why: str | None = None) -> dict[str, Any]:
    """A file as the OpenAI API shows it; `f2l` holds stage, progress, and what is known of the adapter.

    Args:
        why: what keeps workers from taking it up.
    """
    shown = {VideoState.PROCESSED: "processed", VideoState.ERROR: "error"}.get(record.state, "uploaded")
    details: dict[str, Any] = {"stage": record.state.value, "progress": round(record.progress, 3)}
    details |= {"pinned": record.pinned, "last_used_at": record.last_used_at and int(record.last_used_at)}
    if why is not None and record.state is VideoState.UPLOADED:
        details["waits_for"] = why
    if adapter is not None:
        details |= {"adapter": adapter.name, "rank": adapter.rank, "adapter_bytes": adapter.bytes, **adapter.info}
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


def _page(
    videos: VideoService, tenant: str, after: str | None, limit: int, descending: bool, purpose: str | None
) -> tuple[list[dict[str, Any]], bool]:
    catalog = videos.catalog
    records, more = catalog.files(tenant, after=after, limit=limit, descending=descending, purpose=purpose)
    adapters = catalog.adapters_of(records)
    return [file_object(record, adapters.get(record.adapter_name)) for record in records], more


def _model_card(base: dict[str, Any], record: FileRecord) -> dict[str, Any]:
    own = {"id": record.id, "created": int(record.created_at), "root": base["id"], "parent": base["id"]}
    return {**base, **own, "owned_by": "f2l-vllm"}


def _tar(store: Store, name: str, base_model: str) -> bytes:
    """The adapter's files; their config names the base model as whoever unpacks them can load it."""
    directory = store.load_path(name)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(directory.iterdir()):
            if path.name == MANIFEST_FILE:
                continue
            content = path.read_bytes()
            if path.name == CONFIG_FILE:
                content = named_for(content.decode(), base_model).encode()
            info = archive.gettarinfo(path, f"{directory.name}/{path.name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
