"""Answers Anthropic's Messages API about a video that is its `model`, and errors in that API's envelope."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from fastapi import Request

from f2l_vllm.server import vllm_answers, vllm_errors
from f2l_vllm.server.chat.handlers import Handler, fields_of, refuse_videos
from f2l_vllm.server.chat.request import VIDEO_PREFIXES, Video
from f2l_vllm.server.chat.resolve import Asking
from f2l_vllm.server.tenants import tenant_of


class MessagesHandler(Handler):
    """`/v1/messages` and its `count_tokens`: `model` may be a file id."""

    def __init__(self, inner: Any, asking: Asking, base_names: list[str]) -> None:
        super().__init__(vllm_answers.breaking_off(inner), asking, base_names)

    async def create_messages(self, request: Any, raw_request: Request | None = None) -> Any:
        """vLLM's method, with the video resolved first."""
        return await _in_envelope(self._create(request, raw_request), raw_request)

    async def count_tokens(self, request: Any, raw_request: Request | None = None) -> Any:
        """vLLM's method: the tokens of the text, because the adapter costs none. Waits for no adapter."""
        return await _in_envelope(self._count(request, raw_request), raw_request)

    async def _create(self, request: Any, raw_request: Request | None) -> Any:
        fields = await fields_of(raw_request)
        refuse_videos(fields)
        how = self._options(fields, raw_request)
        if not request.model.startswith(VIDEO_PREFIXES):
            return await self._inner.create_messages(request, raw_request)
        source = await self._by_model(request, tenant_of(raw_request), how)
        return await self._answer(self._inner.create_messages, request, raw_request, source)

    async def _count(self, request: Any, raw_request: Request | None) -> Any:
        fields = await fields_of(raw_request)
        refuse_videos(fields)
        self._needs_adapter(self._options(fields, raw_request))
        if request.model.startswith(VIDEO_PREFIXES):
            await self._asking.find([Video(file_id=request.model)], tenant_of(raw_request))
            request.model = self._base_names[0]
        return await self._inner.count_tokens(request, raw_request)


async def _in_envelope(answer: Awaitable[Any], raw_request: Request | None) -> Any:
    """vLLM's routes of this API turn every exception into a fault of the server, so what is the request's is noted for
    the middleware that answers errors."""
    try:
        return await answer
    except asyncio.CancelledError:
        raise
    except Exception as error:
        refused = None if raw_request is None else vllm_errors.refusal(error, raw_request.scope)
        if refused is None or raw_request is None:
            raise
        raw_request.state.refused = refused
        return vllm_errors.error_response(refused)
