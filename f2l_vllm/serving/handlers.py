"""In front of vLLM's chat and completion handlers: find the video, attach its adapter, hold it to the end."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

from fastapi import Request

from f2l_vllm.serving import compat, metrics
from f2l_vllm.serving.errors import APIError, bad_request
from f2l_vllm.serving.questions import FILE_PREFIX, Options, file_ids, options, with_frames, without_videos
from f2l_vllm.serving.registry import Lease
from f2l_vllm.serving.service import VideoService
from f2l_vllm.serving.tenants import tenant_of


class LeasedStream:
    """A streamed answer that holds its adapter until it ends, is closed, or is dropped unread."""

    def __init__(self, stream: AsyncGenerator[str, None], lease: Lease) -> None:
        self._stream = stream
        self._finish = weakref.finalize(self, lease.release)

    def __aiter__(self) -> LeasedStream:
        return self

    async def __anext__(self) -> str:
        try:
            return await anext(self._stream)
        except BaseException:  # the end of the answer, an error, or the client gone
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Stop early: the engine first, then the adapter."""
        try:
            await self._stream.aclose()
        finally:
            self._finish()


class _Handler:
    """A vLLM handler with videos; everything not about videos is the inner handler's."""

    def __init__(self, inner: Any, service: VideoService, base_names: list[str]) -> None:
        self._inner = inner
        self._service = service
        self._base_names = base_names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _options(self, request: Any, raw_request: Request | None) -> Options:
        headers = {} if raw_request is None else raw_request.headers
        return options(request.model_extra, headers, self._service.settings.wait_seconds)

    async def _answer(self, method: Any, request: Any, raw_request: Request | None, file_id: str, wait: float) -> Any:
        """Let the inner handler answer from the file's adapter, under a lease."""
        asked = request.model
        lease = await self._service.lease(file_id, tenant_of(raw_request), wait, param="model")
        token = compat.asked_model.set(asked)
        result = None
        try:
            request.model = lease.key
            result = await method(request, raw_request)
            if hasattr(result, "__aiter__"):
                result = LeasedStream(result, lease)
        finally:
            compat.asked_model.reset(token)
            if not isinstance(result, LeasedStream):
                lease.release()
            failed = result is None or compat.error_status(result) is not None
            metrics.QUESTIONS.labels("adapter", "error" if failed else "answered").inc()
        if not failed:
            metrics.TOKENS_AVOIDED.inc(lease.adapter.info.get("visual_tokens", 0))
        return result


class ChatHandler(_Handler):
    """`/v1/chat/completions`: `model` may be a file id, and a message may hold a `file` part."""

    async def create_chat_completion(self, request: Any, raw_request: Request | None = None) -> Any:
        """vLLM's method, with videos resolved first."""
        how = self._options(request, raw_request)
        by_model = (request.model or "").startswith(FILE_PREFIX)
        frames = how.mode == "frames"
        named = file_ids(request.messages) if not frames else _file_parts(request.messages)
        ids = list(dict.fromkeys([request.model, *named] if by_model else named))
        if not ids:
            return await self._inner.create_chat_completion(request, raw_request)
        if len(ids) > 1:
            message = f"One question names {len(ids)} videos; ask about one video at a time."
            raise bad_request("too_many_videos", message, "messages")
        if not by_model and request.model and request.model not in self._base_names:
            return await self._inner.create_chat_completion(request, raw_request)  # vLLM says which models exist
        if frames:
            return await self._answer_from_frames(request, raw_request, ids[0])
        request.messages = without_videos(request.messages)
        return await self._answer(self._inner.create_chat_completion, request, raw_request, ids[0], how.wait)

    async def _answer_from_frames(self, request: Any, raw_request: Request | None, file_id: str) -> Any:
        record = self._service.file(file_id, tenant_of(raw_request), "model")
        cap = self._service.settings.max_frames_bytes
        if record.bytes > cap:
            message = f"Videos above {cap / 1e6:.0f} MB are answered from their adapter only: leave out f2l.mode."
            raise bad_request("video_too_large_for_frames", message, "f2l")
        path = self._service.store.video_path(record.sha256)
        token = compat.asked_model.set(request.model)
        try:
            request.messages = await asyncio.to_thread(with_frames, request.messages, file_id, path)
            request.model = self._base_names[0]
            result = await self._inner.create_chat_completion(request, raw_request)
        finally:
            compat.asked_model.reset(token)
        metrics.QUESTIONS.labels("frames", "error" if compat.error_status(result) else "answered").inc()
        return result


class CompletionHandler(_Handler):
    """`/v1/completions`: `model` may be a file id."""

    async def create_completion(self, request: Any, raw_request: Request | None = None) -> Any:
        """vLLM's method, with the video resolved first."""
        how = self._options(request, raw_request)
        if not (request.model or "").startswith(FILE_PREFIX):
            return await self._inner.create_completion(request, raw_request)
        if how.mode == "frames":
            raise bad_request("invalid_f2l_options", "f2l.mode 'frames' needs /v1/chat/completions.", "f2l")
        return await self._answer(self._inner.create_completion, request, raw_request, request.model, how.wait)


class Guard:
    """A vLLM handler that does not know videos: a request that names one is refused, not answered without it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not name.startswith("create_") or not asyncio.iscoroutinefunction(attribute):
            return attribute

        @functools.wraps(attribute)
        async def guarded(request: Any, *args: Any, **kwargs: Any) -> Any:
            if (getattr(request, "model", None) or "").startswith(FILE_PREFIX):
                message = "This route does not answer about videos: use /v1/chat/completions or /v1/completions."
                headers = {"X-Should-Retry": "false"}
                raise APIError(
                    HTTPStatus.NOT_IMPLEMENTED, "route_without_videos", message, param="model", headers=headers
                )
            return await attribute(request, *args, **kwargs)

        return guarded


def _file_parts(messages: list[Any]) -> list[str]:
    """File ids of a request answered from frames; its `video_url` parts are vLLM's to read."""
    kept = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            kept.append({"content": [p for p in content if isinstance(p, dict) and p.get("type") == "file"]})
    return file_ids(kept)
