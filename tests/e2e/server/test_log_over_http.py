"""A real server's log, as JSON: every line, whoever wrote it."""

import json

import openai
import pytest


@pytest.fixture
def asked(other_server, clips):
    """The id of a question's answer."""
    video = other_server.upload(clips[1])
    question = [{"role": "user", "content": "What is shown?"}]
    headers = {"X-Request-Id": "of-the-client"}
    answer = other_server.client.chat.completions.create(
        model=video.id, messages=question, max_tokens=2, extra_headers=headers
    )
    assert answer._request_id == "of-the-client"
    return answer.id


def test_every_line_is_an_event_and_those_about_a_request_name_it(other_server, asked):
    with pytest.raises(openai.NotFoundError) as refused:
        other_server.client.files.retrieve("file-of-nobody")
    lines = [json.loads(line) for line in other_server.log.read_text().splitlines()]
    assert {line["part"] for line in lines} >= {"server", "engine", "pool"}
    ours = [line for line in lines if line.get("request_id") == "of-the-client"]
    assert [line["path"] for line in ours if line["logger"] == "uvicorn.access"] == ["/v1/chat/completions"]
    assert asked == "chatcmpl-of-the-client"
    assert any(line["logger"].startswith("vllm.") and asked in line["message"] for line in ours)
    (other,) = (line for line in lines if line.get("request_id") == refused.value.request_id)
    assert (other["method"], other["path"], other["status"]) == ("GET", "/v1/files/file-of-nobody", 404)
