"""Errors as OpenAI clients expect them: an envelope with a message for people and a code for programs."""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from f2l_vllm.server import metrics
from f2l_vllm.store.errors import Unavailable

MESSAGES_ROUTE = "/v1/messages"  # Anthropic's API, which has an envelope of its own
_REPORTED = 5  # faults that one answer lists
_FIELD = re.compile(r"[a-z_][a-z0-9_]*|[0-9]+")
_TYPES = {"str", "int", "float", "bool", "bytes", "list", "dict", "none", "nullable", "body"}  # pydantic's own markers


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
    """404: unknown, deleted, expired, or another tenant's. Callers cannot tell these cases apart."""
    message = f"No video with the id '{file_id}' exists. Upload it with POST /v1/files and use the id it returns."
    return APIError(HTTPStatus.NOT_FOUND, "video_not_found", message, param=param)


def video_not_ready(file_id: str, state: str, waited: float, why: str | None = None) -> APIError:
    """409: not ready after the time the caller was willing to wait. Clients are told not to retry automatically,
    because the caller sets the wait. `why`: the reason if the server cannot work on the video at all."""
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
    """503: the engine could not load the adapter although its files are sound; another attempt may succeed."""
    message = (
        "The video's adapter could not be loaded into the engine. Ask again in some seconds; if that does not help, "
        "the server's log says why."
    )
    return APIError(HTTPStatus.SERVICE_UNAVAILABLE, "adapter_unavailable", message, headers={"Retry-After": "2"})


def shutting_down() -> APIError:
    """503: the server is stopping. It accepts no new work and cuts off work in progress."""
    message = "The server is shutting down. Ask again when it is back; videos in work are not lost."
    headers = {"Retry-After": "10", "Connection": "close"}
    return APIError(HTTPStatus.SERVICE_UNAVAILABLE, "shutting_down", message, headers=headers)


async def answer_unavailable(request: Request, error: Exception) -> JSONResponse:
    """The exception handler for a catalog or store that is unavailable now; the answer says when to retry."""
    assert isinstance(error, Unavailable)
    return await answer(request, unavailable(error))


def unavailable(error: Unavailable) -> APIError:
    """507 or 503: catalog or store cannot be used now."""
    advice = (
        "delete files, or have the operator make room."
        if error.full
        else "nothing was changed; ask again in some seconds."
    )
    status = HTTPStatus.INSUFFICIENT_STORAGE if error.full else HTTPStatus.SERVICE_UNAVAILABLE
    text = str(error)
    message = f"{text[:1].upper()}{text[1:]}: {advice}"
    return APIError(status, error.code, message, headers={"Retry-After": "5"})


async def answer_http(request: Request, error: Exception) -> JSONResponse:
    """The exception handler for what Starlette itself refuses: unknown route, wrong method, oversized body."""
    assert isinstance(error, HTTPException)
    return response(refused_by_starlette(error), request.scope)


def refused_by_starlette(error: HTTPException) -> APIError:
    """Starlette's refusal as an `APIError`, with a code chosen by its status."""
    codes = {404: "route_not_found", 405: "method_not_allowed", 413: "request_too_large"}
    code = codes.get(error.status_code, "invalid_request")
    return APIError(HTTPStatus(error.status_code), code, str(error.detail), headers=dict(error.headers or {}))


async def answer_validation(request: Request, error: Exception) -> JSONResponse:
    """The exception handler for a body, query or path that does not match its route's schema."""
    assert isinstance(error, RequestValidationError)
    faults = {}
    for fault in error.errors():
        name = ".".join(part for part in map(str, fault["loc"]) if _FIELD.fullmatch(part) and part not in _TYPES)
        faults[f"{name or 'the body'}: {str(fault['msg'])[:200]}"] = name
    shown = [*faults][:_REPORTED]
    more = f" (and {len(faults) - len(shown)} more)" if len(faults) > len(shown) else ""
    message = f"The request is not as this route takes it: {'; '.join(shown)}{more}."
    return response(bad_request("invalid_request", message, next(iter(faults.values()), None) or None), request.scope)


async def answer(request: Request, error: Exception) -> JSONResponse:
    """The exception handler for `APIError`."""
    assert isinstance(error, APIError)
    return response(error, request.scope)


def internal_error() -> APIError:
    """500: a fault of this server. The log says more about it than the answer."""
    message = "The server failed over this request, by no fault of the request's: its log says why."
    return APIError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", message)


def response(error: APIError, scope: Scope) -> JSONResponse:
    """Count an error and put it in the envelope of the API that the client called."""
    metrics.ERRORS.labels(error.code).inc()
    path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
    envelope = _messages_envelope(error) if path.startswith(MESSAGES_ROUTE) else _envelope(error)
    return JSONResponse(envelope, status_code=error.status, headers=error.headers)


def chunk(error: APIError, path: str = "") -> str:
    """Count an error and write it as an event of an answer that this route streams."""
    metrics.ERRORS.labels(error.code).inc()
    envelope = _envelope(error)
    if path.endswith("/messages"):
        return f"event: error\ndata: {json.dumps({'type': 'error', **envelope})}\n\n"
    return f"data: {json.dumps(envelope, separators=(',', ':'))}\n\n"


def counted(error: APIError) -> APIError:
    """Count an error that is written in another way."""
    metrics.ERRORS.labels(error.code).inc()
    return error


def _envelope(error: APIError) -> dict[str, Any]:
    kinds = {HTTPStatus.NOT_FOUND: "not_found_error", HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def messages_kind(status: int) -> str:
    """The error type that Anthropic's API uses for this status. Source: its API documentation, Errors."""
    kinds = {
        401: "authentication_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
    return kinds.get(status, "api_error" if status >= 500 else "invalid_request_error")


def _messages_envelope(error: APIError) -> dict[str, Any]:
    return {
        "type": "error",
        "error": {"type": messages_kind(error.status), "message": error.message, "code": error.code},
    }
