"""Errors as OpenAI clients expect them: an envelope with a message for people and a code for programs."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from f2l_vllm.adapters.errors import Unavailable
from f2l_vllm.serving import metrics


class APIError(Exception):
    """A request that cannot be answered. `code` is stable; `message` says what to do next."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = headers or {}


def bad_request(code: str, message: str, param: str | None = None) -> APIError:
    """400: the request itself is at fault."""
    return APIError(HTTPStatus.BAD_REQUEST, code, message, param=param)


def video_not_found(file_id: str, param: str | None = None) -> APIError:
    """404: unknown, deleted, expired, or not the caller's: they look the same from outside."""
    message = f"No video with the id '{file_id}' exists. Upload it with POST /v1/files and use the id it returns."
    return APIError(HTTPStatus.NOT_FOUND, "video_not_found", message, param=param)


def video_not_ready(file_id: str, state: str, waited: float, why: str | None = None) -> APIError:
    """409: still in work after the time the caller would wait. Clients are told not to retry by themselves, because
    the wait is theirs to set. `why`: what keeps the server from working at it at all."""
    reason = f" No hypernetwork worker is ready: {why}." if why else ""
    message = (
        f"Video '{file_id}' is still being internalized (stage '{state}') after waiting {waited:g} s.{reason} "
        "Ask again later, poll GET /v1/files/{id} until its status is 'processed', or allow a longer wait with the "
        "X-F2L-Wait header."
    )
    headers = {"Retry-After": "5", "X-Should-Retry": "false", "X-F2L-File": file_id}
    return APIError(HTTPStatus.CONFLICT, "video_not_ready", message, headers=headers)


def video_failed(file_id: str, code: str | None, message: str | None) -> APIError:
    """422: the video could not be internalized; asking again will not help."""
    text = f"Video '{file_id}' could not be internalized ({code}): {message} Delete it and upload another file."
    return APIError(HTTPStatus.UNPROCESSABLE_ENTITY, "video_failed", text)


def adapter_unavailable() -> APIError:
    """503: the engine could not load the adapter, whose files are sound; another attempt may succeed."""
    message = (
        "The video's adapter could not be loaded into the engine. Ask again in some seconds; if that does not help, "
        "the server's log says why."
    )
    return APIError(HTTPStatus.SERVICE_UNAVAILABLE, "adapter_unavailable", message, headers={"Retry-After": "2"})


async def answer_unavailable(request: Request, error: Exception) -> JSONResponse:
    """The exception handler: a catalog or store that cannot take part now, with a time to come back."""
    assert isinstance(error, Unavailable)
    advice = (
        "delete files, or have the operator make room."
        if error.full
        else "nothing was changed; ask again in some seconds."
    )
    status = HTTPStatus.INSUFFICIENT_STORAGE if error.full else HTTPStatus.SERVICE_UNAVAILABLE
    text = str(error)
    message = f"{text[:1].upper()}{text[1:]}: {advice}"
    return await answer(request, APIError(status, error.code, message, headers={"Retry-After": "5"}))


async def answer_http(_request: Request, error: Exception) -> JSONResponse:
    """The exception handler for what Starlette itself refuses: no such route, another method, too large a body."""
    assert isinstance(error, HTTPException)
    codes = {404: "route_not_found", 405: "method_not_allowed", 413: "request_too_large"}
    code = codes.get(error.status_code, "invalid_request")
    return response(APIError(HTTPStatus(error.status_code), code, str(error.detail), headers=dict(error.headers or {})))


async def answer(_request: Request, error: Exception) -> JSONResponse:
    """The exception handler for `APIError`."""
    assert isinstance(error, APIError)
    return response(error)


def response(error: APIError) -> JSONResponse:
    """An error as OpenAI's envelope, counted."""
    metrics.ERRORS.labels(error.code).inc()
    return JSONResponse(_envelope(error), status_code=error.status, headers=error.headers)


def chunk(error: APIError) -> str:
    """The same in the middle of a streamed answer, counted."""
    metrics.ERRORS.labels(error.code).inc()
    return f"data: {json.dumps(_envelope(error), separators=(',', ':'))}\n\n"


def _envelope(error: APIError) -> dict[str, Any]:
    kinds = {HTTPStatus.NOT_FOUND: "not_found_error", HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
