import asyncio
import json

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from f2l_vllm.client import Answer, NotInternalized, ask, ask_async, processed, upload

CHUNKS = (
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 0, "delta": {"content": " Two "}}]},
    {"choices": [{"index": 0, "delta": {"content": "shapes."}}]},
    {
        "choices": [],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
        "f2l": {"visual_tokens": 64},
    },
)


def replied(request: httpx.Request) -> httpx.Response:
    """As a server that takes a film, has read the second, and could not read the first."""
    if request.url.path == "/v1/chat/completions":
        asked = json.loads(request.content)
        assert asked["temperature"] == 0
        assert asked["f2l"] == {"mode": "frames"}
        lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS)
        return httpx.Response(200, text=f"{lines}data: [DONE]\n\n", headers={"content-type": "text/event-stream"})
    is_bad = b"bad.mp4" in request.read() or request.url.path.endswith("bad.mp4")
    name = "bad.mp4" if is_bad else "good.mp4"
    told = {"status": "error", "status_details": "It has no frame."} if is_bad else {"status": "processed"}
    return httpx.Response(200, json={"id": name, "filename": name, **told})


@pytest.fixture
def client():
    with httpx.Client(transport=httpx.MockTransport(replied)) as http:
        yield OpenAI(base_url="http://server/v1", api_key="none", http_client=http)


def test_a_file_that_fails_is_said_by_name_with_its_reason(client, tmp_path):
    films = [tmp_path / "good.mp4", tmp_path / "bad.mp4"]
    for film in films:
        film.write_bytes(b"a film")
    assert [file.id for file in upload(client, films[0])] == ["good.mp4"]
    with pytest.raises(NotInternalized, match=r"^bad\.mp4 was not internalized: It has no frame\.$"):
        upload(client, *films)


def test_an_answer_is_its_text_its_times_and_what_the_server_says_of_it(client):
    answer = ask(client, "good.mp4", "How many?", 8, {"f2l": {"mode": "frames"}})
    assert (answer.text, answer.prompt_tokens, answer.output_tokens) == ("Two shapes.", 9, 2)
    assert answer.details == {"visual_tokens": 64}
    assert 0 < answer.ttft <= answer.latency
    assert len(answer.itl) == 2
    assert answer.tpot == answer.latency - answer.ttft == pytest.approx(sum(answer.itl))


def test_the_asynchronous_ones_do_the_same():
    async def both() -> Answer:
        http = httpx.AsyncClient(transport=httpx.MockTransport(replied))
        async with AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=http) as client:
            with pytest.raises(NotInternalized, match="It has no frame"):
                await processed(client, await client.files.retrieve("bad.mp4"))
            return await ask_async(client, "good.mp4", "How many?", 8, {"f2l": {"mode": "frames"}}, started=1.0)

    answer = asyncio.run(both())
    assert (answer.text, answer.started) == ("Two shapes.", 1.0)
