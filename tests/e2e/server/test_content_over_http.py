"""Messages that would have the server open something, or decode too much: a clear error, and nothing is opened."""

import base64
import io
import socket
import threading
from contextlib import suppress

import httpx
import openai
import pytest
from PIL import Image

from tests.unit.video.test_picture import bomb

TEXT = {"type": "text", "text": "What is shown?"}


@pytest.fixture
def trap():
    """An address inside, and how often somebody came."""
    came = []
    listener = socket.create_server(("127.0.0.1", 0))

    def listen():
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                came.append(connection)
                connection.close()

    threading.Thread(target=listen, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/x", came
    listener.close()


def picture(data=None, **details):
    if data is None:
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (200, 10, 10)).save(file, "PNG")
        data = file.getvalue()
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"},
        **details,
    }


def post(server, path, body):
    return httpx.post(server.url + path, json={"model": "base", "max_tokens": 4, **body}, timeout=60)


def test_no_message_of_any_route_has_the_server_open_something(server, trap):
    address, came = trap
    parts = [
        {"type": "image_pil", "image_pil": address},
        {"image_pil": address},
        {"image_url": address},
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "image_url", "uuid": "u", "image_url": {"url": address}},
        {"type": "x", "uuid": "u", "image_pil": address},
        {"type": "text", "text": "a", "uuid": "u", "image_pil": address},
        {"type": "input_image", "image_url": address, "detail": "auto"},
        {"type": "audio_url", "audio_url": {"url": address}},
        {"type": "video_url", "video_url": {"url": address}},
        {"type": "image_embeds", "image_embeds": {"image_embeds": address}},
        {"type": "image", "source": {"type": "url", "url": address}},
    ]
    for part in parts:
        for extra in ({}, {"f2l": {"mode": "frames"}}):
            messages = [{"role": role, "content": [part, TEXT]} for role in ("user", "assistant", "user")]
            found = post(server, "/v1/chat/completions", {"messages": messages, **extra})
            assert found.status_code == 400, (part, found.text)
        for path, body in (
            ("/v1/responses", {"input": messages}),
            ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "1", "output": [part]}]}),
            ("/v1/messages", {"messages": messages[:1]}),
            ("/v1/messages", {"messages": messages[:1], "system": [part]}),
        ):
            found = post(server, path, body)
            assert 400 <= found.status_code < 500 or "route_without_videos" in found.text, (path, part, found.text)
    assert came == []


def test_pictures_and_what_is_kept_under_a_uuid_are_answered(server):
    def ask(*parts):
        messages = [{"role": "user", "content": [*parts, TEXT]}]
        return server.client.chat.completions.create(model="base", messages=messages, max_tokens=4, temperature=0)

    answers = [ask(part) for part in (picture(), picture(uuid="logo"), {**picture(uuid="logo"), "image_url": None})]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1
    with pytest.raises(openai.APIStatusError) as error:
        ask({"type": "image_url", "image_url": None, "uuid": "never seen"})
    assert 400 <= error.value.status_code < 500
    body = {"messages": [{"role": "user", "content": [picture(), TEXT]}]}
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert post(server, path, {**body, "prompt": "a", "prompt_embeds": "AAAA"}).status_code == 400


@pytest.mark.parametrize(
    ("data", "code"),
    [(bomb(13_300, 13_300), "image_too_large"), (b"no picture", "invalid_image"), (b"GIF89a", "invalid_image")],
)
def test_a_picture_that_is_none_or_too_large_is_said_so(server, data, code):
    found = post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": [picture(data), TEXT]}]})
    assert (found.status_code, found.json()["error"]["code"]) == (400, code)
