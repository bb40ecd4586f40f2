"""What this package relies on in the answers of vLLM, whole, streamed and stored, and in what makes them.

`tests/unit/server/test_vllm_api.py` holds the contract tests.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from openai.types.responses import ResponseErrorEvent
from starlette.datastructures import State

from f2l_vllm.server.errors import APIError

_STARTED = "event: message_start\ndata: "


def wrap_chat_answers(state: State, wrap: Callable[[Any], Any]) -> None:
    """Put `wrap` around the methods that answer chats; call it before `wrap_servings`. Each takes the request first.

    The handler of `/v1/messages` answers with its own `create_chat_completion` and then converts the answer.
    """
    for name, method in (
        ("openai_serving_chat", "create_chat_completion"),
        ("openai_serving_chat_batch", "create_batch_chat_completion"),
        ("anthropic_serving_messages", "create_chat_completion"),
    ):
        if (serving := getattr(state, name, None)) is not None:
            setattr(serving, method, wrap(getattr(serving, method)))


def wrap_responses(state: State, wrap: Callable[[Any], Any], wrap_behind: Callable[[Any], Any]) -> None:
    """Put `wrap` around `create_responses`, which returns a response or a stream, and `wrap_behind` around
    `responses_full_generator`, which writes a whole response; call it before `wrap_servings`."""
    if (serving := getattr(state, "openai_serving_responses", None)) is not None:
        serving.create_responses = wrap(serving.create_responses)
        serving.responses_full_generator = wrap_behind(serving.responses_full_generator)


@functools.cache
def _extensible(kind: Any) -> Any:
    return type(kind.__name__, (kind,), {"model_config": {"extra": "allow"}, "__module__": __name__})


def background_task(responses: Any, response_id: str) -> asyncio.Task[Any] | None:
    """The task that writes a response which the client has asked for in the background, until it has ended."""
    task: asyncio.Task[Any] | None = responses.background_tasks.get(response_id)
    return task


def detail_stored(responses: Any, response_id: str, details: Mapping[str, Any]) -> None:
    """Add what it was answered from to what vLLM has stored of a response, if it has."""
    if (stored := responses.response_store.get(response_id)) is not None:
        stored.f2l = dict(details)


def detailed_chunk(chunk: Any, details: Mapping[str, Any]) -> Any:
    """Add details to a stream's last chunk, the one with usage and without choices, to the message with which an
    answer of `/v1/messages` starts, or to the response in an event. Other chunks stay unchanged."""
    if not isinstance(chunk, str):
        if (response := getattr(chunk, "response", None)) is not None:
            response.f2l = dict(details)
        return chunk
    if chunk.startswith(_STARTED):
        body = json.loads(chunk.removeprefix(_STARTED))
        body["message"]["f2l"] = details
        return f"{_STARTED}{json.dumps(body)}\n\n"
    if '"choices":[]' not in chunk or '"usage":{' not in chunk:
        return chunk
    body = json.loads(chunk.removeprefix("data: "))
    return f"data: {json.dumps({**body, 'f2l': details}, separators=(',', ':'))}\n\n"


def error_event(error: APIError, number: int) -> Any:
    """An event that ends a stream of the Responses API; its route writes any object that has a type and a JSON form."""
    kind = {"code": error.code, "message": error.message, "param": error.param}
    return ResponseErrorEvent(type="error", sequence_number=number, **kind)


def error_status(response: Any) -> int | None:
    """The HTTP status of vLLM's `ErrorResponse`, or None for any other result."""
    error = getattr(response, "error", None)
    return int(error.code) if error is not None and hasattr(error, "code") else None


def forget_response(responses: Any, response_id: str) -> None:
    """Drop what vLLM stores of a response; by itself it drops nothing until the server stops."""
    for stored in (responses.response_store, responses.msg_store, responses.event_store):
        stored.pop(response_id, None)


def with_details(response: Any, details: Mapping[str, Any]) -> Any:
    """A whole response with what it was answered from, under `f2l`. vLLM's models of OpenAI's responses accept extra
    fields, those of Anthropic's do not."""
    kind: Any = type(response)
    if kind.model_config.get("extra") != "allow":
        response = _extensible(kind).model_construct(**dict(response))
    response.f2l = dict(details)
    return response


def breaking_off(messages: Any) -> Any:
    """Make the chat streams of the handler of `/v1/messages` raise what went wrong.

    It converts them by `message_stream_converter`, which tells the client of an exception, and of vLLM's error chunk
    only that it is no chunk.
    """
    answer = messages.create_chat_completion

    async def chunks(stream: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        async with aclosing(stream):
            async for chunk in stream:
                if is_error_chunk(chunk):
                    raise RuntimeError(json.loads(chunk.removeprefix("data: "))["error"]["message"])
                yield chunk

    async def answered(request: Any, raw_request: Any = None) -> Any:
        result = await answer(request, raw_request)
        return chunks(result) if hasattr(result, "__aiter__") else result

    messages.create_chat_completion = answered
    return messages


def is_error_chunk(chunk: Any) -> bool:
    """Whether a stream's chunk is vLLM's error envelope, or its event of that kind on `/v1/messages`."""
    return isinstance(chunk, str) and chunk.startswith(('data: {"error":', "event: error\n"))
