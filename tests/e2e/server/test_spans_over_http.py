"""The default model about stretches of a long video, two videos at once, and a video at an address: right answers."""

import asyncio
import functools
import json
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import av
import openai
import pytest
import torch
from openai import AsyncOpenAI

from f2l_vllm.synthetic.render import draw, write_mp4
from f2l_vllm.synthetic.world import MovingShape, Scene
from tests.e2e.server.conftest import CHUNK_SECONDS

SECONDS, FPS, SIZE = CHUNK_SECONDS, 10, (320, 240)  # of each scene; a chunk holds one
GREEDY = {"temperature": 0, "max_tokens": 24}


def scene(colour, shape, background, left, right):
    return Scene((MovingShape(colour, shape, "moves right", left, right, 0.12, 0.12),), background)


CIRCLE = scene("red", "circle", "black", (0.2, 0.3), (0.7, 0.3))
SQUARE = scene("blue", "square", "black", (0.3, 0.7), (0.8, 0.7))
ON_WHITE = scene("green", "triangle", "white", (0.2, 0.5), (0.7, 0.5))


@pytest.fixture(scope="module")
def server(default_server):
    return default_server


@pytest.fixture(scope="module")
def upload(server):
    def one(path):
        return server.upload(path)

    return one


@pytest.fixture(scope="module")
def long(upload, tmp_path_factory):
    """Two scenes after each other."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    times_T = (torch.arange(SECONDS * FPS) + 0.5) / (SECONDS * FPS)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for part in (CIRCLE, ON_WHITE):
            for image_HWC in draw(part, times_T, SIZE[1], SIZE[0]):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image_HWC, format="rgb24")))
        container.mux(stream.encode())
    return upload(path)


@pytest.fixture(scope="module")
def pair(upload, tmp_path_factory):
    """Two videos, each with one shape of the same world."""
    folder = tmp_path_factory.mktemp("pair")
    return [upload(write_mp4(part, folder / f"{i}.mp4", SIZE, FPS, SECONDS)) for i, part in enumerate((CIRCLE, SQUARE))]


def part(file, **span):
    return {"type": "file", "file": {"file_id": file.id, **({"f2l": span} if span else {})}}


def ask(server, question, *parts):
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    return server.client.chat.completions.create(model="base", messages=messages, **GREEDY)


def text(response):
    return response.choices[0].message.content


def source(response):
    return response.model_extra["f2l"]


def test_two_videos_are_seen_together(server, pair):
    together = {
        question: text(ask(server, question, *map(part, pair)))
        for question in (
            "How many shapes are there?",
            "What colour is the circle?",
            "What colour is the square?",
            "What is the background?",
        )
    }
    assert list(together.values()) == ["Two.", "Red.", "Blue.", "Black."]
    assert [text(ask(server, "How many shapes are there?", part(video))) for video in pair] == ["One.", "One."]


def test_a_span_is_answered_from_its_own_chunks(server, long):
    background = "What is the background?"
    first = ask(server, background, part(long, start=0, end=SECONDS))
    second = ask(server, background, part(long, start=SECONDS))
    assert [text(first), text(second)] == ["Black.", "White."]
    assert source(first)["videos"][0]["covered"] == [[0, SECONDS]]
    assert source(second)["videos"][0]["covered"] == [[SECONDS, 2 * SECONDS]]
    whole = source(ask(server, background, part(long)))
    assert whole["videos"][0]["covered"] == [[0, 2 * SECONDS]]
    assert whole["adapter"] == long.model_extra["f2l"]["adapter"]
    halves = [source(response) for response in (first, second)]
    assert sum(half["visual_tokens_avoided"] for half in halves) == whole["visual_tokens_avoided"]
    assert [half["rank"] for half in halves] == [16, 16]
    assert whole["rank"] == 24
    inside = source(ask(server, background, part(long, start=3, end=5)))
    assert inside == halves[0]  # the chunk it lies in, and the answer says so
    across = source(ask(server, background, part(long, start=SECONDS - 1, end=SECONDS + 1)))
    assert across == whole


def test_spans_and_videos_mix(server, long, pair):
    response = ask(server, "How many shapes are there?", part(long, end=SECONDS), part(pair[1]))
    assert text(response) == "Two."
    assert [video["covered"] for video in source(response)["videos"]] == [[[0, SECONDS]], [[0, SECONDS]]]
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, "How many?", part(long), *map(part, pair))
    assert error.value.code == "too_many_videos"


def test_tools_and_schemas_are_filled_from_what_was_seen(server, pair):
    colour = {"type": "string", "enum": ["red", "green", "blue"]}
    schema = {
        "type": "object",
        "properties": {"colour": colour},
        "required": ["colour"],
        "additionalProperties": False,
    }
    content = [*map(part, pair), {"type": "text", "text": "What colour is the square?"}]
    question = {
        "model": "base",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 100,
    }
    form = {"type": "json_schema", "json_schema": {"name": "paint", "schema": schema, "strict": True}}
    formed = server.client.chat.completions.create(**question, response_format=form)
    tool = {"type": "function", "function": {"name": "paint", "parameters": schema}}
    choice = {"type": "function", "function": {"name": "paint"}}
    called = server.client.chat.completions.create(**question, tools=[tool], tool_choice=choice)
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "paint"
    for arguments in (text(formed), call.function.arguments):
        assert json.loads(arguments)["colour"] in colour["enum"]
    assert [source(answer)["rank"] for answer in (formed, called)] == [24, 24]


def test_a_span_outside_says_what_there_is(server, long):
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, "What is the background?", part(long, start=100, end=120))
    assert error.value.code == "span_not_available"
    assert "0 to 8, 8 to 16 s" in error.value.message


class Web(SimpleHTTPRequestHandler):
    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self):
        self.asked[self.path] += 1
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    """A web server over `tmp_path`; its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Web, directory=str(tmp_path))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_video_at_an_address_is_fetched_for_all_who_ask_at_once_and_never_stale(server, pair, web, tmp_path):
    write_mp4(ON_WHITE, tmp_path / "clip.mp4", SIZE, FPS, SECONDS)
    url = {"type": "video_url", "video_url": {"url": f"{web}/clip.mp4?token=secret"}}
    content = [url, {"type": "text", "text": "What is the background?"}]

    async def all_at_once():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            asked = [create(model="base", messages=[{"role": "user", "content": content}], **GREEDY) for _ in range(30)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(all_at_once())
    assert {text(answer) for answer in answers} == {"White."}
    (file_id,) = {source(answer)["videos"][0]["file_id"] for answer in answers}
    assert Web.asked["/clip.mp4?token=secret"] < 30
    file = server.client.files.retrieve(file_id)
    assert (file.filename, file.purpose) == ("clip.mp4", "user_data")
    known = ask(server, "What is the background?", url)
    assert source(known)["videos"][0]["file_id"] == file_id
    (tmp_path / "clip.mp4").write_bytes(server.client.files.content(pair[0].id).read())
    changed = ask(server, "What is the background?", url)
    assert text(changed) == "Black."
    assert source(changed)["videos"][0]["file_id"] != file_id
    assert source(changed)["adapter"] == pair[0].model_extra["f2l"]["adapter"]
    (tmp_path / "clip.mp4").unlink()
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, "What is the background?", url)
    assert error.value.code == "url_unreachable"
    assert "404" in error.value.message


def test_the_responses_api_answers_with_the_first_word_first(server):
    asked = {"model": "base", "input": "How many shapes are there?", "temperature": 0, "max_output_tokens": 8}
    text = server.client.responses.create(**asked).output_text
    assert text == text.strip() != ""
    with server.client.responses.stream(**asked) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert stream.get_final_response().output_text == text
