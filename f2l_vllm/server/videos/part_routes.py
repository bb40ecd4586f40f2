"""The routes under `/v1/uploads`: a large video in parts, so that a broken connection costs one part.

Source: OpenAI API reference, Uploads.
"""

from __future__ import annotations

import asyncio
import hashlib
from http import HTTPStatus
from typing import Any

from fastapi import Request
from pydantic import BaseModel, Field

from f2l_vllm.catalog.tables import Upload
from f2l_vllm.catalog.upload_tables import PartialUpload
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.tenants import tenant_of
from f2l_vllm.server.videos.parts import PART_BYTES, check_pending
from f2l_vllm.server.videos.routes import file_object, router, service
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.server.videos.uploads import check_size, expiry_of, inspect, purpose_of, receive_part, shown_name


class ExpiresAfter(BaseModel):
    """When the file will expire."""

    anchor: str
    seconds: int


class NewUpload(BaseModel):
    """What is going to come."""

    filename: str
    purpose: str
    bytes: int = Field(gt=0)
    mime_type: str | None = None
    expires_after: ExpiresAfter | None = None


class Completion(BaseModel):
    """The parts in their order."""

    part_ids: list[str] = Field(min_length=1)
    md5: str | None = None


@router.post("/v1/uploads")
async def begin_upload(given: NewUpload, request: Request) -> dict[str, Any]:
    """Announce a video, or the requests of a batch; the parts may come for an hour."""
    videos, tenant = service(request), tenant_of(request)
    purpose, name = purpose_of(given.purpose), shown_name(given.filename)
    after = given.expires_after
    expiry = expiry_of(after and after.anchor, after and after.seconds)
    check_size(purpose, given.bytes, videos.settings)
    videos.check_room(given.bytes)
    await _check_quota(videos, tenant, given.bytes)
    return upload_object(await videos.parts.begin(tenant, given.bytes, name, purpose, expiry))


@router.post("/v1/uploads/{upload_id}/parts")
async def add_part(upload_id: str, request: Request) -> dict[str, Any]:
    """Keep one part. Parts may come in any order, at the same time, and again."""
    videos, tenant = service(request), tenant_of(request)
    upload = await videos.parts.pending(upload_id, tenant)
    temporary = videos.store.temporary()
    try:
        sha256 = await receive_part(request, temporary, min(PART_BYTES, upload.bytes), videos.check_room)
        upload = await videos.parts.pending(upload_id, tenant)
        part_id = await videos.parts.add(upload, temporary, sha256)
    finally:
        await asyncio.to_thread(videos.store.discard, temporary)
    return {
        "id": part_id,
        "object": "upload.part",
        "created_at": int(videos.catalog.now()),
        "upload_id": upload_id,
    }


@router.post("/v1/uploads/{upload_id}/complete")
async def complete_upload(upload_id: str, given: Completion, request: Request) -> dict[str, Any]:
    """Make a file of the parts, as an upload in one piece does; a second time answers with the same file."""
    videos, tenant = service(request), tenant_of(request)
    async with videos.parts.lock(upload_id):
        upload = await videos.parts.find(upload_id, tenant)
        if upload.status != "completed":
            try:
                upload = await _complete(videos, upload, given)
            except Exception:  # another server, asked the same, may have dropped the parts meanwhile
                upload = await videos.parts.find(upload_id, tenant)
                if upload.status != "completed":
                    raise
        file_id = upload.file_id or ""
        found = (await asyncio.to_thread(videos.catalog.find, [file_id], tenant)).get(file_id)
    return upload_object(upload, None if found is None else file_object(found.file, found.adapter))


@router.post("/v1/uploads/{upload_id}/cancel")
async def cancel_upload(upload_id: str, request: Request) -> dict[str, Any]:
    """Drop the parts."""
    videos, tenant = service(request), tenant_of(request)
    async with videos.parts.lock(upload_id):
        ended = await videos.parts.end(await videos.parts.pending(upload_id, tenant), "cancelled")
    if ended.status != "cancelled":  # another server has completed it meanwhile
        check_pending(ended)
    return upload_object(ended)


def upload_object(upload: PartialUpload, file: dict[str, Any] | None = None) -> dict[str, Any]:
    """An upload as the OpenAI API shows it; `file` is what it has become."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": int(upload.created_at),
        "expires_at": int(upload.expires_at),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": file,
    }


async def _complete(videos: VideoService, upload: PartialUpload, given: Completion) -> PartialUpload:
    """However often and wherever this is begun, it comes to one file."""
    check_pending(upload)
    videos.check_room(upload.bytes)
    temporary = videos.store.temporary()
    try:
        sha256 = await videos.parts.join(upload, given.part_ids, given.md5, temporary)
        await inspect(temporary, videos.settings, upload.purpose)
        expiry = upload.expires_seconds, upload.idle_seconds
        file_id = f"file-{hashlib.sha256(upload.id.encode()).hexdigest()[:24]}"
        whole = Upload(upload.tenant, sha256, upload.bytes, upload.filename, upload.purpose, *expiry, file_id=file_id)
        record = await videos.enter(temporary, whole)
    finally:
        await asyncio.to_thread(videos.store.discard, temporary)
    ended = await videos.parts.end(upload, "completed", record.id)
    if ended.status != "completed":  # another server has cancelled it meanwhile
        await videos.remove(record.id, upload.tenant)
        check_pending(ended)
    return ended


async def _check_quota(videos: VideoService, tenant: str, more: int) -> None:
    cap = videos.settings.tenant_bytes
    if cap is None:
        return
    stored = await asyncio.to_thread(videos.catalog.stored_bytes, tenant)
    promised = await asyncio.to_thread(videos.catalog.promised_bytes, tenant)
    if stored + promised + more > cap:
        message = "There is no room for this video among your files and pending uploads: delete or cancel some."
        raise APIError(HTTPStatus.FORBIDDEN, "storage_quota_exceeded", message, param="bytes")
