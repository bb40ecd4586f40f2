"""Turns the failures of vLLM into answers: whose fault each one is, and what the client is told.

vLLM reads and renders a request in many places, and a malformed request can raise any Python exception there. Until
the engine is asked, vLLM's handlers depend on the request alone, so a failure there is the request's fault. After that
it is the server's fault, except when an answer could not be completed within its constraint.
"""

from __future__ import annotations

import logging
import re
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Scope

from f2l_vllm.server import errors
from f2l_vllm.server.errors import APIError, bad_request
from f2l_vllm.store.errors import Unavailable

logger = logging.getLogger(__name__)

_OWN = "f2l_vllm."
# Messages of Python itself, and of libraries about their arguments: only vLLM's own messages say what to do.
_PYTHONS = re.compile(
    r"^(invalid literal|could not convert|not enough values|too many values|cannot unpack|unhashable|.*codec can't"
    r"|.* got (an unexpected|multiple values)|.*object (is|has|of)|TextEncodeInput|.*int too large|.*<class )"
)
_BROKEN_REQUEST = "The request cannot be read: one of its values is of a kind or in a place that nothing here takes."


@dataclass
class _Progress:
    """How far the server has got with a request."""

    asked_engine: bool = False


_progress: ContextVar[_Progress | None] = ContextVar("progress", default=None)


def follow() -> None:
    """Start to record whether this request has reached the engine."""
    _progress.set(_Progress())


def note_engine_asked() -> None:
    """Record that the request reached the engine: from here on a failure is not the request's fault."""
    if (progress := _progress.get()) is not None:
        progress.asked_engine = True


def refusal(error: Exception, scope: Scope) -> APIError | None:
    """The answer if the request is at fault, None if the server is.

    Relies on `vllm.exceptions` (`VLLMClientError` and its subclasses, `GracefulHTTPError`, `GenerationError`).
    """
    from vllm.exceptions import (
        GenerationError,
        GracefulHTTPError,
        VLLMClientError,
        VLLMError,
        VLLMNotFoundError,
    )

    if isinstance(error, APIError):
        return error
    if isinstance(error, StarletteHTTPException):
        return errors.refused_by_starlette(error)
    if isinstance(error, GracefulHTTPError):
        headers = {"Retry-After": "1"} if error.http_status >= 500 else {}
        return APIError(error.http_status, "engine_busy", error.message, headers=headers)
    if isinstance(error, GenerationError):
        cause = error.__cause__
        return cause if isinstance(cause, APIError) else None
    if isinstance(error, VLLMNotFoundError):
        return APIError(HTTPStatus.NOT_FOUND, "model_not_found", _shown(str(error)), param="model")
    if isinstance(error, VLLMClientError):
        param = getattr(error, "parameter", None)
        return bad_request("invalid_request", _shown(str(error.args[0] if error.args else error)), param)
    if isinstance(error, VLLMError | Unavailable | MemoryError | ConnectionError) or not _is_vllms(scope):
        return None
    if (progress := _progress.get()) is not None and progress.asked_engine:
        return None
    logger.warning("a request was refused as unreadable: %s: %s", type(error).__name__, str(error)[:500])
    says_what = type(error) in (ValueError, NotImplementedError) and str(error) and not _PYTHONS.match(str(error))
    return bad_request("invalid_request", _shown(str(error)) if says_what else _BROKEN_REQUEST)


def install_handlers(app: FastAPI) -> None:
    """Replace vLLM's exception handlers (`exception_handling/register.py`) with ours. vLLM's handlers for a dead engine
    stay, because they end the server."""
    from vllm.exceptions import VLLMError

    stock: Any = app.exception_handlers[VLLMError]

    async def judge(request: Request, error: Exception) -> Any:
        if (refused := refusal(error, request.scope)) is not None:
            return errors.response(refused, request.scope)
        if isinstance(error, VLLMError):
            return await stock(request, error)
        logger.error("%s %r failed", request.method, request.url.path, exc_info=error)
        return errors.response(errors.internal_error(), request.scope)

    for kind in (VLLMError, ValueError, TypeError, OverflowError, NotImplementedError):
        app.add_exception_handler(kind, judge)
    app.add_exception_handler(APIError, errors.answer)
    app.add_exception_handler(RequestValidationError, errors.answer_validation)
    app.add_exception_handler(HTTPException, errors.answer_http)
    app.add_exception_handler(StarletteHTTPException, errors.answer_http)
    app.add_exception_handler(Unavailable, errors.answer_unavailable)


def error_response(error: APIError) -> Any:
    """vLLM's own `ErrorResponse`, in the place of an answer that a middleware gives with all that belongs to it."""
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    return ErrorResponse(
        error=ErrorInfo(message=error.message, type=errors.messages_kind(error.status), code=int(error.status))
    )


def _is_vllms(scope: Scope) -> bool:
    """Whether the request was routed to one of vLLM's own routes."""
    endpoint = scope.get("endpoint")
    return endpoint is not None and not getattr(endpoint, "__module__", "").startswith(_OWN)


def _shown(message: str) -> str:
    """A message shortened to a readable length, without the machine's paths and addresses."""
    from vllm.entrypoints.serve.exception_handling.utils import sanitize_message

    text: str = sanitize_message(message[:2000])
    return text[:1000]
