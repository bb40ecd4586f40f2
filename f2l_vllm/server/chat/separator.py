"""Removes the whitespace that a chat template writes between a speaker's name and the text from answers.

A prompt ends with `Assistant:`, and earlier turns read `Assistant: Red.`, so the model answers ` Red.`. Clients get
the text without the space; tokens, usage and logprobs stay the model's own.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

logger = logging.getLogger(__name__)

Render = Callable[[list[dict[str, Any]], bool], str]  # messages, and whether to add the prompt for an answer
_QUESTION, _ANSWER = "Which colour?", "Red"


def find(render: Render) -> str:
    """What the template writes between a prompt and its answer if that is whitespace, else an empty string."""
    asked = {"role": "user", "content": _QUESTION}
    try:
        prompt = render([dict(asked)], True)
        turn = render([dict(asked), {"role": "assistant", "content": _ANSWER}], False)
    except Exception as error:  # a template, or a tokenizer's own code, may raise anything
        logger.debug("the chat template does not render a turn of the assistant's: %s", error)
        return ""
    between = turn.removeprefix(prompt).partition(_ANSWER)[0] if turn.startswith(prompt) else ""
    return between if between.isspace() else ""


def left_out(answer: Callable[..., Awaitable[Any]], separator: str) -> Callable[..., Awaitable[Any]]:
    """Wrap a method that answers chats to remove the separator from its answers, streamed or whole."""

    @functools.wraps(answer)
    async def answered(request: Any, *args: Any, **kwargs: Any) -> Any:
        begins_a_turn = _begins_a_turn(request)  # before the call: vLLM's tool parsers modify the request
        result = await answer(request, *args, **kwargs)
        if not begins_a_turn:
            return result
        if hasattr(result, "__aiter__"):
            return _stream(result, separator, getattr(request, "n", None) or 1)
        for choice in getattr(result, "choices", ()):
            if choice.message.content:
                choice.message.content = choice.message.content.removeprefix(separator)
        return result

    return answered


def left_out_of_responses(answer: Callable[..., Awaitable[Any]], separator: str) -> Callable[..., Awaitable[Any]]:
    """Like `left_out`, for the Responses API: its answers hold several texts, and its streams consist of events."""

    @functools.wraps(answer)
    async def answered(request: Any, *args: Any, **kwargs: Any) -> Any:
        result = await answer(request, *args, **kwargs)
        if hasattr(result, "__aiter__"):
            return _events(result, separator)
        _leave_out(result, separator)
        return result

    return answered


def left_out_behind(write: Callable[..., Awaitable[Any]], separator: str) -> Callable[..., Awaitable[Any]]:
    """Like `left_out_of_responses`, for the method that writes answers in the background, which are fetched later."""

    @functools.wraps(write)
    async def written(request: Any, *args: Any, **kwargs: Any) -> Any:
        result = await write(request, *args, **kwargs)
        if request.background and not request.stream:
            _leave_out(result, separator)
        return result

    return written


async def _events(events: AsyncGenerator[Any, None], separator: str) -> AsyncGenerator[Any, None]:
    begun: dict[tuple[int, int], str | None] = {}  # by text: the part of the separator seen so far; None: past it
    async with aclosing(events):
        async for event in events:
            if getattr(event, "type", "") == "response.output_text.delta":
                place = event.output_index, event.content_index
                before = begun.get(place, "")
                if before is not None:
                    text = before + event.delta
                    is_whole = not separator.startswith(text) or text == separator
                    begun[place] = None if is_whole else text
                    event.delta = text.removeprefix(separator) if is_whole else ""
            else:  # the event holds a whole text, part, item or response
                for part in (event, getattr(event, "part", None), getattr(event, "item", None)):
                    _leave_out_of_part(part, separator)
                _leave_out(getattr(event, "response", None), separator)
            yield event


def _leave_out(response: Any, separator: str) -> None:
    for item in getattr(response, "output", None) or ():
        _leave_out_of_part(item, separator)


def _leave_out_of_part(part: Any, separator: str) -> None:
    """Edit a text, or the texts inside a part; reasoning and tool arguments have no text at these places."""
    if getattr(part, "type", "") in ("output_text", "response.output_text.done"):
        part.text = part.text.removeprefix(separator)
    for one in getattr(part, "content", None) or ():
        _leave_out_of_part(one, separator)


def _begins_a_turn(request: Any) -> bool:
    """Whether the answer follows the template's own prompt, and nothing else determines how it begins."""
    return (
        request.add_generation_prompt
        and not request.echo
        and request.chat_template is None
        and request.structured_outputs is None
    )


async def _stream(chunks: AsyncGenerator[str, None], separator: str, choices: int) -> AsyncGenerator[str, None]:
    begun = dict.fromkeys(range(choices), "")  # by choice not yet past its separator: the part seen
    async with aclosing(chunks):
        async for chunk in chunks:
            yield _edited(chunk, separator, begun) if begun else chunk


def _edited(chunk: str, separator: str, begun: dict[int, str]) -> str:
    if '"choices":[{' not in chunk and '"type":"text_delta"' not in chunk:  # an error, usage, or the end
        return chunk
    head, _, data = chunk.partition("data: ")
    body: Mapping[str, Any] = json.loads(data)
    # From vLLM 0.33 on, streams of `/v1/messages` are Anthropic's events here, not yet chunks of a chat.
    choices, text_field = body.get("choices"), "content"
    if choices is None:
        choices, text_field = [{"index": 0, "delta": body["delta"]}], "text"
    is_edited = False
    for choice in choices:
        index, delta = choice["index"], choice["delta"]
        if index not in begun:
            continue
        given = delta.get(text_field) or ""
        kept, text = "", begun[index] + given
        if separator.startswith(text) and text != separator and choice.get("finish_reason") is None:
            begun[index] = text
        else:
            kept = text.removeprefix(separator)
            del begun[index]
        if kept != given:
            delta[text_field], is_edited = kept, True
    return f"{head}data: {json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n" if is_edited else chunk
