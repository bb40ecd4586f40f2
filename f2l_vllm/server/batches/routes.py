"""The routes under `/v1/batches`: many questions in one file, answered within a day.

Source: OpenAI API reference, Batch.
"""

from __future__ import annotations

import asyncio
import functools
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from pydantic import BaseModel, Field

from f2l_vllm.catalog.batch_tables import BatchRecord, BatchState
from f2l_vllm.catalog.batches import TooManyBatches
from f2l_vllm.server.batches.lines import ENDPOINTS
from f2l_vllm.server.errors import APIError, bad_request
from f2l_vllm.server.tenants import tenant_of
from f2l_vllm.server.videos.part_routes import ExpiresAfter
from f2l_vllm.server.videos.routes import router, service
from f2l_vllm.server.videos.uploads import expiry_of

__all__ = ["router"]

_SECONDS = 86400.0
_AT_ONCE = 64  # open batches of one tenant
_TIMES = [f"{state}_at" for state in BatchState if state is not BatchState.VALIDATING]
_Short = Annotated[str, Field(max_length=64)]
_Long = Annotated[str, Field(max_length=512)]


class NewBatch(BaseModel):
    """What is to be asked."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[_Short, _Long] | None = Field(None, max_length=16)
    output_expires_after: ExpiresAfter | None = None


@router.post("/v1/batches")
async def create_batch(given: NewBatch, request: Request) -> dict[str, Any]:
    """Have the requests of a file with the purpose `batch` answered within 24 hours, behind everybody's questions."""
    videos, tenant = service(request), tenant_of(request)
    if given.endpoint not in ENDPOINTS:
        message = f"The endpoint must be one of {', '.join(ENDPOINTS)}; got {given.endpoint[:80]!r}."
        raise bad_request("invalid_request", message, "endpoint")
    found = await asyncio.to_thread(videos.catalog.file, given.input_file_id, tenant)
    if found is None or found.purpose != "batch":
        message = f"No file '{given.input_file_id[:80]}' with the purpose 'batch' exists: upload it first."
        raise APIError(HTTPStatus.NOT_FOUND, "input_file_not_found", message, param="input_file_id")
    after = given.output_expires_after
    output_seconds, _ = expiry_of(after and after.anchor, after and after.seconds)
    details = {"metadata": given.metadata, "output_seconds": output_seconds}
    add = functools.partial(videos.catalog.add_batch, seconds=_SECONDS, limit=_AT_ONCE, details=details)
    try:
        batch = await asyncio.to_thread(add, tenant, given.endpoint, found.id)
    except TooManyBatches as error:
        message = f"{_AT_ONCE} of your batches are open: wait for one to end, or cancel one."
        headers = {"Retry-After": "60"}
        raise APIError(HTTPStatus.TOO_MANY_REQUESTS, "too_many_batches", message, headers=headers) from error
    request.app.state.f2l_batches.ring()
    return batch_object(batch)


@router.get("/v1/batches")
async def list_batches(
    request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """The caller's batches, newest first, a page at a time. One that has ended is listed for 30 days."""
    catalog, tenant = service(request).catalog, tenant_of(request)
    try:
        found, more = await asyncio.to_thread(catalog.batches, tenant, after=after, limit=limit)
    except KeyError as error:
        raise bad_request("invalid_cursor", f"'after' names no batch of yours: {after!r}.", "after") from error
    shown = [batch_object(batch) for batch in found]
    ends = {"first_id": found[0].id if found else None, "last_id": found[-1].id if found else None}
    return {"object": "list", "data": shown, **ends, "has_more": more}


@router.get("/v1/batches/{batch_id}")
async def retrieve_batch(batch_id: str, request: Request) -> dict[str, Any]:
    """One batch. When it has ended, `GET /v1/files/{id}/content` has its `output_file_id` and its `error_file_id`."""
    return batch_object(await _find(request, batch_id))


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: str, request: Request) -> dict[str, Any]:
    """Ask nothing more. The batch is `cancelled` a moment later, and its files hold what was answered."""
    batch = await _find(request, batch_id)
    batch = await asyncio.to_thread(service(request).catalog.move_batch, batch, BatchState.CANCELLING)
    if batch.state not in (BatchState.CANCELLING, BatchState.CANCELLED):
        raise bad_request("batch_not_open", f"The batch '{batch.id}' is {batch.state}: there is nothing to cancel.")
    request.app.state.f2l_batches.ring()
    return batch_object(batch)


def batch_object(batch: BatchRecord) -> dict[str, Any]:
    """A batch as the OpenAI API shows it."""
    details = batch.details
    times = dict.fromkeys(_TIMES) | {name: details[name] for name in _TIMES if name in details}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": details.get("errors"),
        "input_file_id": batch.input_file,
        "completion_window": "24h",
        "status": batch.state,
        "output_file_id": details.get("output_file_id"),
        "error_file_id": details.get("error_file_id"),
        "created_at": int(batch.created_at),
        "expires_at": int(batch.expires_at),
        **times,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": details["metadata"],
    }


async def _find(request: Request, batch_id: str) -> BatchRecord:
    found = await asyncio.to_thread(service(request).catalog.batch, batch_id, tenant_of(request))
    if found is None:
        message = f"No batch '{batch_id[:80]}' exists: begin one with POST /v1/batches."
        raise APIError(HTTPStatus.NOT_FOUND, "batch_not_found", message)
    return found
