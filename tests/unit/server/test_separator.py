"""Answers begin with their first word: what the chat template writes before it stays with the template."""

import asyncio
import json
from collections.abc import AsyncGenerator
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from openai.types.responses import (
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
)
from vllm.entrypoints.anthropic.protocol import AnthropicDelta, AnthropicStreamEvent
from vllm.entrypoints.anthropic.serving import wrap_data_with_event

from f2l_vllm.server.chat import separator

TINY = (files("f2l_vllm.models") / "f2l-tiny" / "chat_template.jinja").read_text()
LINES = (
    "{% for m in messages %}{{ m.role }}:\n\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}")
REFUSING = "{{ 1 / 0 if messages | length > 1 }}"
DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("template", "expected"), [(TINY, " "), (LINES, "\n\n"), (CHATML, ""), (THINKING, ""), (REFUSING, ""), ("x", "")]
)
def test_only_whitespace_that_the_template_writes_before_a_turn_is_a_separator(template: str, expected: str) -> None:
    def render(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        text = jinja2.Environment().from_string(template)
        return text.render(messages=messages, add_generation_prompt=add_generation_prompt)

    assert separator.find(render) == expected


def request(**options: Any) -> SimpleNamespace:
    usual = {"n": 1, "add_generation_prompt": True, "echo": False, "chat_template": None, "structured_outputs": None}
    return SimpleNamespace(**{**usual, **options})


def chunk(*choices: tuple[int, dict[str, Any]], end: str | None = None, **more: Any) -> str:
    told = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": end} for index, delta in choices]
    body = {"id": "chatcmpl-8", "object": "chat.completion.chunk", "choices": told, **more}
    return f"data: {json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"


def streamed(chunks: list[str], between: str = " ", **options: Any) -> list[str]:
    async def vllm() -> AsyncGenerator[str, None]:
        for one in chunks:
            yield one

    async def answer(_: Any, raw_request: Any = None) -> AsyncGenerator[str, None]:
        return vllm()

    async def read() -> list[str]:
        return [one async for one in await separator.left_out(answer, between)(request(**options), None)]

    return asyncio.run(read())


def test_a_stream_of_two_choices_begins_each_with_its_first_word() -> None:
    usage = 'data: {"id":"chatcmpl-8","choices":[],"usage":{"prompt_tokens":9}}\n\n'
    given = [
        chunk((0, {"role": "assistant", "content": ""}), (1, {"role": "assistant", "content": ""})),
        chunk((1, {"content": " Blau größer"}), token_ids=[4, 5]),
        chunk((1, {"content": " than"})),
        chunk((0, {"content": " "})),
        chunk((0, {"content": " Red"})),
        chunk((0, {"content": " "})),
        chunk((0, {"content": ""}), end="stop"),
        chunk((1, {}), end="length"),
        usage,
        DONE,
    ]
    assert streamed(given, n=2) == [
        given[0],
        chunk((1, {"content": "Blau größer"}), token_ids=[4, 5]),
        given[2],
        chunk((0, {"content": ""})),
        *given[4:],  # exactly one separator, and only at the beginning
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["\n", "\nRed"], ["", "Red"]),
        (["\n\n", "Red"], ["", "Red"]),
        (["\n", " Red"], ["", "\n Red"]),  # something else, that only begins alike
        (["\n"], ["\n"]),
        (["Red", "\n\n"], ["Red", "\n\n"]),
    ],
)
def test_a_separator_of_several_tokens_is_all_or_nothing(given: list[str], expected: list[str]) -> None:
    def chunks(texts: list[str]) -> list[str]:
        return [chunk((0, {"content": text}), end="stop" if text is texts[-1] else None) for text in texts]

    assert streamed([*chunks(given), DONE], "\n\n") == [*chunks(expected), DONE]


def test_a_stream_of_anthropics_events_begins_with_its_first_word() -> None:
    """As vLLM 0.33 hands them over."""

    def event(kind: str, **fields: Any) -> str:
        return wrap_data_with_event(AnthropicStreamEvent(type=kind, **fields).model_dump_json(exclude_unset=True), kind)

    def delta(text: str) -> str:
        return event("content_block_delta", index=0, delta=AnthropicDelta(type="text_delta", text=text))

    ends = event("content_block_stop", index=0), event("message_stop")
    assert streamed([delta(" Red"), delta(" and"), *ends]) == [delta("Red"), delta(" and"), *ends]


def test_calls_of_tools_errors_and_what_does_not_begin_a_turn_stay_as_they_are() -> None:
    call = [{"index": 0, "function": {"name": "look", "arguments": ' {"at": 1}'}}]
    given = [
        chunk((0, {"role": "assistant", "content": None})),
        chunk((0, {"tool_calls": call})),
        'data: {"error":{"message":"the engine is dead","code":500}}\n\n',
        DONE,
    ]
    assert streamed(given) == given
    answer = [chunk((0, {"content": " Red"})), DONE]
    assert streamed(answer) == [chunk((0, {"content": "Red"})), DONE]
    for options in (
        {"add_generation_prompt": False},  # goes on with a turn that has begun
        {"echo": True},
        {"chat_template": "{{ messages }}"},
        {"structured_outputs": {"choice": [" Red"]}},
    ):
        assert streamed(answer, **options) == answer


def test_whole_answers_lose_the_separator_and_nothing_else() -> None:
    def response() -> SimpleNamespace:
        texts = (" Red.", "Red. ", "  Red", "", None, " ")
        choices = [
            SimpleNamespace(message=SimpleNamespace(content=text, tool_calls=[]), logprobs=[" "]) for text in texts
        ]
        return SimpleNamespace(choices=choices, usage=7)

    async def answer(_: Any) -> SimpleNamespace:
        return response()

    async def refuse(_: Any) -> SimpleNamespace:
        return refused

    refused = SimpleNamespace(error=SimpleNamespace(code=400))
    answered = asyncio.run(separator.left_out(answer, " ")(request(n=6)))
    assert [choice.message.content for choice in answered.choices] == ["Red.", "Red. ", " Red", "", None, ""]
    assert (answered.choices[0].logprobs, answered.usage) == ([" "], 7)
    assert asyncio.run(separator.left_out(refuse, " ")(request())) is refused


def test_a_stream_that_is_left_closes_the_one_behind_it() -> None:
    closed = []

    async def vllm() -> AsyncGenerator[str, None]:
        try:
            yield chunk((0, {"content": " Red"}))
            yield DONE
        finally:
            closed.append(True)

    async def answer(_: Any) -> AsyncGenerator[str, None]:
        return vllm()

    async def leave() -> None:
        stream = await separator.left_out(answer, " ")(request())
        await anext(stream)
        await stream.aclose()
        assert closed

    asyncio.run(leave())


def response_of(*texts: str) -> Any:
    parts = [ResponseOutputText(text=text, type="output_text", annotations=[]) for text in texts]
    message = ResponseOutputMessage(id="m", content=parts, role="assistant", status="completed", type="message")
    return SimpleNamespace(output=[message])


def test_a_response_begins_with_its_first_word() -> None:
    async def answer(_: Any) -> Any:
        return response_of(" Red.", " Blue.")

    response = asyncio.run(separator.left_out_of_responses(answer, " ")(None))
    assert [part.text for part in response.output[0].content] == ["Red.", "Blue."]


def test_an_answer_written_in_the_background_begins_with_its_first_word_once() -> None:
    async def write(_: Any) -> Any:
        return response_of("  Red.")

    for background, stream, left in ((True, False, " Red."), (False, False, "  Red."), (True, True, "  Red.")):
        request = SimpleNamespace(background=background, stream=stream)
        response = asyncio.run(separator.left_out_behind(write, " ")(request))
        assert response.output[0].content[0].text == left  # others are edited where they are given out


@pytest.mark.parametrize("deltas", [[" Red", "."], [" ", "Red."], ["", " ", "Red", "."]])
def test_a_stream_of_a_response_begins_with_its_first_word(deltas: list[str]) -> None:
    place: dict[str, Any] = {"content_index": 0, "item_id": "m", "output_index": 0, "logprobs": []}

    async def events() -> AsyncGenerator[Any, None]:
        for number, delta in enumerate(deltas):
            yield ResponseTextDeltaEvent(
                delta=delta, sequence_number=number, type="response.output_text.delta", **place
            )
        number = len(deltas)
        yield ResponseTextDoneEvent(text=" Red.", sequence_number=number, type="response.output_text.done", **place)
        whole = response_of(" Red.")
        yield SimpleNamespace(type="response.content_part.done", part=whole.output[0].content[0])
        yield SimpleNamespace(type="response.output_item.done", item=response_of(" Red.").output[0])
        yield SimpleNamespace(type="response.completed", response=response_of(" Red."))

    async def read() -> list[Any]:
        async def answer(_: Any) -> Any:
            return events()

        return [event async for event in await separator.left_out_of_responses(answer, " ")(None)]

    *said, text, part, item, completed = asyncio.run(read())
    assert "".join(event.delta for event in said) == "Red."
    assert [event.sequence_number for event in said] == list(range(len(deltas)))  # none is missing
    assert text.text == part.part.text == item.item.content[0].text == "Red."
    assert completed.response.output[0].content[0].text == "Red."
