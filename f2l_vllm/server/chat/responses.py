"""Answers OpenAI's Responses API about videos, and keeps apart whose the responses are that vLLM stores."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Request

from f2l_vllm.server import errors, vllm_answers, vllm_api, vllm_errors
from f2l_vllm.server.chat.handlers import Handler, fields_of, has_lost_its_adapter, refuse_videos
from f2l_vllm.server.chat.request import Options, Video, is_framed, videos, without_videos
from f2l_vllm.server.chat.resolve import AnswerSource, Asking
from f2l_vllm.server.errors import APIError, adapter_unavailable, bad_request
from f2l_vllm.server.tenants import asking_tenant, tenant_of

_KEPT = 1000  # responses; vLLM itself would store them until the server stops


@dataclass(frozen=True)
class _Kept:
    """A response that vLLM stores: whose it is, and which videos the conversation has been about."""

    tenant: str
    videos: tuple[Video, ...]


class ResponsesHandler(Handler):
    """`/v1/responses`: `model` may be a file id, and a message may hold `input_file` parts.

    A response that continues another one is about its videos, too.
    """

    def __init__(self, inner: Any, asking: Asking, base_names: list[str]) -> None:
        super().__init__(inner, asking, base_names)
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # by the response's id, oldest first

    async def create_responses(self, request: Any, raw_request: Request | None = None) -> Any:
        """vLLM's method, with the videos resolved first."""
        fields, tenant = await fields_of(raw_request), tenant_of(raw_request)
        how = self._options(request.model_extra, raw_request)
        messages = _messages(fields.get("input", request.input))
        earlier = self._of(request.previous_response_id, tenant).videos if request.previous_response_id else ()
        asked = list(dict.fromkeys([*earlier, *videos(request.model, messages, how.span)]))
        if how.mode != "adapter":
            if request.background:
                message = "An answer from frames is written at once: leave out 'background', or f2l.mode."
                raise bad_request("invalid_f2l_options", message, "f2l")
            request.store = False  # frames are addresses of this request's
        kept = self._keep(request, _Kept(tenant, tuple(asked)))
        answer: Any = None
        try:
            if asked and self._knows(request.model):  # vLLM reports an unknown model
                answer = await self._about(asked, request, fields, messages, how, raw_request, tenant)
            else:
                refuse_videos({"input": messages})
                answer = await self._inner.create_responses(request, raw_request)
                if hasattr(answer, "__aiter__"):
                    answer = _told(answer, AnswerSource("adapter"), raw_request)
        finally:
            if kept and (answer is None or vllm_answers.error_status(answer) is not None):
                self._kept.pop(request.request_id, None)  # or it was the oldest of too many
        return answer

    async def retrieve_responses(self, response_id: str, starting_after: int | None, stream: bool | None) -> Any:
        """vLLM's method, for responses of the caller."""
        self._of(response_id, asking_tenant.get())
        return await self._inner.retrieve_responses(response_id, starting_after=starting_after, stream=stream)

    async def cancel_responses(self, response_id: str) -> Any:
        """vLLM's method, for responses of the caller."""
        self._of(response_id, asking_tenant.get())
        return await self._inner.cancel_responses(response_id)

    async def _about(
        self,
        asked: Sequence[Video],
        request: Any,
        fields: Mapping[str, Any],
        messages: list[Any],
        how: Options,
        raw_request: Request | None,
        tenant: str,
    ) -> Any:
        text = without_videos(messages)
        refuse_videos({"input": text})  # in the output of a function, say
        source, read = await self._source(messages if how.mode == "adapter" else text, asked, how, tenant)
        try:
            if text != messages:  # vLLM's own types for what the items are
                kept = {"request_id": request.request_id, "store": request.store}
                request = type(request).model_validate({**fields, **kept, "input": text})
            if how.mode != "adapter":
                items = _messages(request.input)
                request.input = [old if not is_framed(new) else new for old, new in zip(items, read, strict=True)]
        except BaseException:
            source.release()
            raise

        async def answer(request: Any, raw_request: Request | None) -> Any:
            result = await self._inner.create_responses(request, raw_request)
            task = vllm_answers.background_task(self._inner, request.request_id) if request.background else None
            if task is not None and (lease := source.lease) is not None:
                source.lease = None  # the answer is written behind what the client gets

                def written(_: asyncio.Task[Any]) -> None:
                    vllm_answers.detail_stored(self._inner, request.request_id, source.details)
                    lease.release()

                task.add_done_callback(written)
            return _told(result, source, raw_request) if hasattr(result, "__aiter__") else result

        return await self._answer(answer, request, raw_request, source)

    def _of(self, response_id: str, tenant: str) -> _Kept:
        """What is known of the caller's response.

        Raises:
            APIError: `response_not_found`: unknown, no longer stored, or another tenant's.
        """
        found = self._kept.get(response_id)
        if found is None or found.tenant != tenant:
            why = "" if self._inner.enable_store else " This server stores none (VLLM_ENABLE_RESPONSES_API_STORE)."
            message = f"No response with the id '{response_id[:256]}' is stored.{why} Send the conversation as 'input'."
            raise APIError(HTTPStatus.NOT_FOUND, "response_not_found", message, param="response_id")
        return found

    def _keep(self, request: Any, kept: _Kept) -> bool:
        """Enter a response that vLLM is going to store, before it does, and drop the oldest.

        Raises:
            APIError: `invalid_request`: the client chose the id of another response.
        """
        if not (self._inner.enable_store and request.store):
            return False
        if request.request_id in self._kept:
            raise bad_request("invalid_request", "Another response has this id: leave it out.", "request_id")
        self._kept[request.request_id] = kept
        if len(self._kept) > _KEPT:
            vllm_answers.forget_response(self._inner, self._kept.popitem(last=False)[0])
        return True


def _messages(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list) else [{"role": "user", "content": given}]


async def _told(
    events: AsyncGenerator[Any, None], source: AnswerSource, raw_request: Request | None
) -> AsyncGenerator[Any, None]:
    """The events of an answer; the last one tells the client of a failure, over which vLLM would cut the connection."""
    number = 0
    try:
        async with aclosing(events):
            async for event in events:
                number = getattr(event, "sequence_number", number) + 1
                yield event
    except Exception as error:
        if vllm_api.is_engine_dead(error):
            raise
        refused = adapter_unavailable() if await has_lost_its_adapter(source) else None
        if refused is None and raw_request is not None:
            cause = error.__context__ if vllm_api.is_failed_generation(error.__context__) else error
            refused = vllm_errors.refusal(cause, raw_request.scope) if isinstance(cause, Exception) else None
        yield vllm_answers.error_event(errors.counted(refused or errors.internal_error()), number)
