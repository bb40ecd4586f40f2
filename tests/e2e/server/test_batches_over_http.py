"""Batches with the stock client: answered, refused, cancelled, of one tenant alone, and on after a kill."""

import asyncio
import json
import os
import signal
import time

import openai
import pytest
from openai import AsyncOpenAI

from tests.e2e.server.conftest import keys_of
from tests.support.documents import URL, blocks
from tests.support.server import Server

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is shown?"}]
ENDS = ("completed", "failed", "expired", "cancelled")


def request(custom_id, model, url=CHAT, **body):
    body = {"model": model, "max_tokens": 8, "temperature": 0, "messages": QUESTION, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def uploaded(client, requests):
    text = "".join(json.dumps(one) + "\n" for one in requests)
    return client.files.create(file=("questions.jsonl", text.encode()), purpose="batch").id


def begun(client, requests, endpoint=CHAT, **options):
    file_id = uploaded(client, requests)
    return client.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h", **options)


def ended(client, batch, seconds=120.0):
    until = time.monotonic() + seconds
    while batch.status not in ENDS and time.monotonic() < until:
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def lines(client, file_id):
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


@pytest.fixture(scope="module")
def client(other_server):
    return other_server.client


@pytest.fixture(scope="module")
def videos(other_server, clips):
    """One is ready, the other only on its way."""
    ready = other_server.upload(clips[3]).id
    coming = other_server.client.files.create(file=clips[4], purpose="vision").id
    yield ready, coming
    for video in (ready, coming):
        other_server.client.files.delete(video)


def test_questions_about_many_videos_are_answered_as_if_asked_one_by_one(client, videos):
    requests = [request(f"{n}-{video}", video, max_tokens=n) for video in videos for n in (4, 8)]
    part = {"type": "file", "file": {"file_id": videos[0]}}
    with_part = [{"role": "user", "content": [part, {"type": "text", "text": "What is shown?"}]}]
    requests.append(request("part", "base", messages=with_part, f2l={"wait": "none"}))
    requests.append(request("unknown", "file-unknown"))
    batch = begun(client, requests, metadata={"from": "test"})
    assert batch.object == "batch"
    assert batch.status == "validating"
    assert batch.expires_at - batch.created_at == 86400
    batch = ended(client, batch)
    assert (batch.status, batch.metadata, batch.errors) == ("completed", {"from": "test"}, None)
    assert batch.request_counts.model_dump() == {"total": 6, "completed": 5, "failed": 1}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    found = lines(client, batch.output_file_id)
    assert [one["custom_id"] for one in found] == [one["custom_id"] for one in requests[:5]]
    assert len({one["id"] for one in found}) == 5
    for one, asked in zip(found, requests, strict=False):
        response = client.chat.completions.create(**{k: v for k, v in asked["body"].items() if k != "f2l"})
        answer = one["response"]["body"]
        assert (one["error"], one["response"]["status_code"]) == (None, 200)
        assert answer["choices"][0]["message"]["content"] == response.choices[0].message.content
        assert answer["f2l"]["videos"]
    (failed,) = lines(client, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("unknown", 404)
    assert failed["response"]["body"]["error"]["code"] == "video_not_found"
    files = {file.id: file.purpose for file in client.files.list()}
    assert files[batch.input_file_id] == "batch"
    assert files[batch.output_file_id] == files[batch.error_file_id] == "batch_output"
    with pytest.raises(openai.BadRequestError, match="is no video"):
        client.chat.completions.create(model=batch.input_file_id, messages=QUESTION)
    assert batch.input_file_id not in [model.id for model in client.models.list()]
    client.files.delete(batch.output_file_id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.output_file_id)
    assert client.batches.retrieve(batch.id).output_file_id == batch.output_file_id


def test_the_other_endpoints_and_the_asynchronous_client(client, videos):
    async def run():
        async with AsyncOpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0) as other:
            bodies = {
                "/v1/responses": {"input": "What is shown?", "max_output_tokens": 16},
                "/v1/completions": {"prompt": "It shows", "max_tokens": 4},
            }
            for url, body in bodies.items():
                line = {"custom_id": "one", "method": "POST", "url": url, "body": {"model": videos[0], **body}}
                content = ("q.jsonl", json.dumps(line).encode())
                file = await other.files.create(file=content, purpose="batch")
                batch = await other.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
                while batch.status not in ENDS:
                    await asyncio.sleep(0.1)
                    batch = await other.batches.retrieve(batch.id)
                assert batch.status == "completed"
                (found,) = (await other.files.content(batch.output_file_id)).text.splitlines()
                assert json.loads(found)["response"]["status_code"] == 200
            return [one.id async for one in other.batches.list(limit=1)]

    assert len(asyncio.run(run())) >= 2


def test_what_is_wrong_is_said_before_anything_is_asked(client, videos):
    with pytest.raises(openai.NotFoundError, match="purpose 'batch'"):
        client.batches.create(input_file_id=videos[0], endpoint=CHAT, completion_window="24h")
    file_id = uploaded(client, [request("one", videos[0]), request("one", videos[0], stream=True)])
    with pytest.raises(openai.BadRequestError, match="endpoint must be one of"):
        client.batches.create(input_file_id=file_id, endpoint="/v1/embeddings", completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="completion_window"):
        client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="1h")
    batch = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    batch = ended(client, batch)
    assert batch.status == "failed"
    assert [(fault.line, fault.code, fault.param) for fault in batch.errors.data] == [
        (2, "unsupported_field", "stream")
    ]
    assert batch.output_file_id is None
    with pytest.raises(openai.BadRequestError, match="is failed"):
        client.batches.cancel(batch.id)


def test_a_batch_is_its_own_tenants_alone(other_server, client, videos):
    batch = ended(client, begun(client, [request("one", videos[0])]))
    other = client.with_options(api_key=keys_of(other_server.home)("add", "batches"))
    time.sleep(1.0)
    for call in (
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
        lambda: other.files.content(batch.output_file_id),
        lambda: begun_on(other, batch.input_file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert list(other.batches.list()) == []
    theirs = ended(other, begun(other, [request("one", videos[0])]))
    (failed,) = lines(other, theirs.error_file_id)
    assert failed["response"]["body"]["error"]["code"] == "video_not_found"


def begun_on(client, file_id):
    return client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")


def test_a_cancelled_batch_stops_at_once_and_keeps_what_was_answered(client, videos):
    long = {"max_tokens": 3000, "ignore_eos": True}
    requests = [request("short", videos[0]), *(request(f"long-{n}", videos[0], **long) for n in range(200))]
    batch = begun(client, requests)
    while not (batch := client.batches.retrieve(batch.id)).request_counts.completed:
        time.sleep(0.05)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    assert batch.request_counts.completed == 1  # no long one was waited for
    assert [one["custom_id"] for one in lines(client, batch.output_file_id)] == ["short"]
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_the_guides_program_works(other_server, client, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    begin, read = blocks("docs/batches.md", "python")
    names = {}
    exec(begin.replace(URL, other_server.url).replace('"none"', repr(client.api_key)), names)
    assert ended(client, names["batch"]).status == "completed"
    exec(read, names)
    said = capsys.readouterr().out
    assert all(f"{video} " in said for video in videos)


def test_a_kill_doubles_and_loses_no_answer(hypernetwork_model, clips, tmp_path):
    home, server = tmp_path / "home", None
    try:
        server = Server(hypernetwork_model, home, "--api-key", "secret", api_key="secret")
        server.wait_ready()
        video = server.upload(clips[0]).id
        requests = [request(str(n), video, max_tokens=40, ignore_eos=True) for n in range(150)]
        batch = begun(server.client, requests)
        while (batch := server.client.batches.retrieve(batch.id)).request_counts.completed < 20:
            time.sleep(0.05)
        os.kill(server.process.pid, signal.SIGKILL)
        server.stop()
        server = Server(hypernetwork_model, home, "--api-key", "secret", api_key="secret")
        server.wait_ready()
        again = server.client.batches.retrieve(batch.id)
        assert batch.request_counts.completed < 150
        assert batch.request_counts.completed <= again.request_counts.completed
        batch = ended(server.client, batch)
        assert batch.status == "completed"
        found = lines(server.client, batch.output_file_id)
        assert [one["custom_id"] for one in found] == [one["custom_id"] for one in requests]
        assert batch.request_counts.completed == 150
    finally:
        if server is not None:
            server.stop()
