"""Handlers in front of vLLM's: they find a question's videos, attach the adapter, and hold it until the answer ends."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import Request

from f2l_vllm.server import errors, metrics, vllm_answers, vllm_api
from f2l_vllm.server.chat.request import (
    MODES,
    VIDEO_PREFIXES,
    Options,
    Video,
    names_a_video,
    options,
    videos,
    with_frames,
    without_videos,
)
from f2l_vllm.server.chat.resolve import AnswerSource, Asking, from_frames
from f2l_vllm.server.errors import adapter_unavailable, bad_request
from f2l_vllm.server.tenants import tenant_of

for _mode in MODES:
    metrics.QUESTIONS.labels(_mode, "answered")  # shown as 0, like the others of `metrics`


class AnswerStream:
    """A streamed answer that names its source. It holds its adapter until it ends, is closed, or is dropped unread."""

    def __init__(self, stream: AsyncGenerator[str, None], source: AnswerSource, path: str = "") -> None:
        """`path`: the route that streams it, which decides how an error is written."""
        self._stream = stream
        self._path = path
        self._source = source
        self._finish = weakref.finalize(self, source.release)

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> str:
        try:
            chunk = await anext(self._stream)
            if vllm_answers.is_error_chunk(chunk) and await has_lost_its_adapter(self._source):
                return errors.chunk(adapter_unavailable(), self._path)
            return vllm_answers.detailed_chunk(chunk, self._source.details)
        except BaseException:  # the end of the answer, an error, or the client gone
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Stop early: first the engine's stream, then release the adapter."""
        try:
            await self._stream.aclose()
        finally:
            self._finish()


async def has_lost_its_adapter(source: AnswerSource) -> bool:
    """Whether an answer failed because the engine had dropped the adapter and could not load it again."""
    try:
        return source.lease is not None and not await source.lease.confirm()
    except Exception as error:
        if vllm_api.is_engine_dead(error):
            return False  # the answer failed because of that, and vLLM reports it
        raise


class Handler:
    """A vLLM handler with videos; the inner handler answers everything else."""

    def __init__(self, inner: Any, asking: Asking, base_names: list[str]) -> None:
        self._inner = inner
        self._asking = asking
        self._base_names = base_names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _options(self, fields: Mapping[str, Any] | None, raw_request: Request | None) -> Options:
        headers = {} if raw_request is None else raw_request.headers
        return options(fields, headers, self._asking.service.settings.wait_seconds)

    def _knows(self, model: str | None) -> bool:
        return not model or model in self._base_names or model.startswith(VIDEO_PREFIXES)

    async def _source(
        self, messages: Sequence[Any], asked: Sequence[Video], how: Options, tenant: str
    ) -> tuple[AnswerSource, list[Any]]:
        """Resolve the videos; with the messages as the engine reads them."""
        if how.mode == "adapter":
            text = without_videos(messages)  # before the wait, to report a missing question at once
            return await self._asking.adapter(await self._asking.find(asked, tenant), tenant, how.wait), text
        if any(video.is_stream for video in asked):
            message = "A stream is answered from its adapters only: leave out f2l.mode."
            raise bad_request("invalid_f2l_options", message, "f2l")
        if any(video.span is not None for video in asked):
            message = "Frames are taken of the whole video: leave out start and end, or f2l.mode."
            raise bad_request("span_not_available", message, "messages")
        if how.mode == "frames":  # vLLM reads addresses itself; no file is kept for them
            named = await self._asking.find([video for video in asked if video.url is None], tenant)
            addresses = {video: video.url for video in asked if video.url is not None}
            return from_frames(named), with_frames(messages, {**addresses, **await self._asking.frames(named)})
        named = await self._asking.find(asked, tenant)
        framed = with_frames(messages, await self._asking.frames(named))
        return await self._asking.adapter(named, tenant, how.wait, how.mode), framed

    async def _by_model(self, request: Any, tenant: str, how: Options) -> AnswerSource:
        """The source of a route that names its video by `model` alone, and whose prompt has no place for frames."""
        self._needs_adapter(how)
        named = await self._asking.find([Video(file_id=request.model, span=how.span)], tenant)
        return await self._asking.adapter(named, tenant, how.wait)

    def _needs_adapter(self, how: Options) -> None:
        if how.mode != "adapter":
            raise bad_request("invalid_f2l_options", f"f2l.mode '{how.mode}' needs /v1/chat/completions.", "f2l")

    async def _answer(self, method: Any, request: Any, raw_request: Request | None, source: AnswerSource) -> Any:
        """Let the inner handler answer from the source, and release the source when the answer ends."""
        token = vllm_api.asked_model.set(request.model or self._base_names[0])
        noted: list[int] = []
        noting = vllm_api.visual_tokens.set(noted)
        result = None
        try:
            request.model = self._base_names[0] if source.lease is None else source.lease.key
            result = await method(request, raw_request)
            source.details["visual_tokens"] = sum(noted)
            if hasattr(result, "__aiter__"):
                result = AnswerStream(result, source, "" if raw_request is None else raw_request.url.path)
        except Exception as error:
            if vllm_api.is_failed_generation(error) and await has_lost_its_adapter(source):
                raise adapter_unavailable() from error
            raise
        finally:
            vllm_api.asked_model.reset(token)
            vllm_api.visual_tokens.reset(noting)
            if not isinstance(result, AnswerStream):
                source.release()
            failed = result is None or vllm_answers.error_status(result) is not None
            metrics.QUESTIONS.labels(source.mode, "error" if failed else "answered").inc()
        if not failed:
            metrics.TOKENS_AVOIDED.inc(source.visual_tokens_avoided)
            if not isinstance(result, AnswerStream):
                result = vllm_answers.with_details(result, source.details)
        return result


class ChatHandler(Handler):
    """`/v1/chat/completions`: `model` may be a file id, and a message may hold `file` and `video_url` parts."""

    async def create_chat_completion(self, request: Any, raw_request: Request | None = None) -> Any:
        """vLLM's method, with videos resolved first."""
        how, tenant = self._options(request.model_extra, raw_request), tenant_of(raw_request)
        asked = videos(request.model, request.messages, how.span)
        if not asked or not self._knows(request.model):  # vLLM reports an unknown model
            return await self._inner.create_chat_completion(request, raw_request)
        source, request.messages = await self._source(request.messages, asked, how, tenant)
        return await self._answer(self._inner.create_chat_completion, request, raw_request, source)


class CompletionHandler(Handler):
    """`/v1/completions`: `model` may be a file id."""

    async def create_completion(self, request: Any, raw_request: Request | None = None) -> Any:
        """vLLM's method, with the video resolved first."""
        how = self._options(request.model_extra, raw_request)
        if not (request.model or "").startswith(VIDEO_PREFIXES):
            return await self._inner.create_completion(request, raw_request)
        source = await self._by_model(request, tenant_of(raw_request), how)
        return await self._answer(self._inner.create_completion, request, raw_request, source)


class Guard:
    """Wraps a vLLM handler that does not know videos, to refuse requests that name a video."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not name.startswith("create_") or not asyncio.iscoroutinefunction(attribute):
            return attribute

        @functools.wraps(attribute)
        async def guarded(request: Any, raw_request: Request | None = None, *args: Any, **kwargs: Any) -> Any:
            refuse_videos(await fields_of(raw_request), getattr(request, "model", None))
            return await attribute(request, raw_request, *args, **kwargs)

        return guarded


async def fields_of(raw_request: Request | None) -> Mapping[str, Any]:
    """The body as the client sent it: not all request models keep fields that they do not know."""
    return {} if raw_request is None else await raw_request.json()


def refuse_videos(fields: Mapping[str, Any], model: str | None = None) -> None:
    """Refuse a request whose model or input names a video.

    Raises:
        APIError: `route_without_videos`.
    """
    by_model = (model or "").startswith(VIDEO_PREFIXES)
    if by_model or names_a_video([fields.get("input"), fields.get("messages")]):
        message = "This route does not answer about videos named like this: use /v1/chat/completions."
        raise bad_request("route_without_videos", message, "model" if by_model else "input")
