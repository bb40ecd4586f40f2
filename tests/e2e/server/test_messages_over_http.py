"""Anthropic's Messages API about a video, with the stock anthropic client."""

import anthropic
import pytest
from anthropic import Anthropic

QUESTION = [{"role": "user", "content": "What is shown in the video?"}]
GREEDY = {"max_tokens": 12, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def client(server):
    return Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def video(server, clips):
    return server.upload(clips[0])


def ask(client, model, messages=QUESTION, **options):
    return client.messages.create(model=model, messages=messages, **{**GREEDY, **options})


def test_a_video_as_the_model_gives_the_answer_of_a_chat(server, client, video):
    chat = server.client.chat.completions.create(model=video.id, messages=QUESTION, temperature=0, max_tokens=12)
    message = ask(client, video.id)
    assert (message.type, message.role, message.model) == ("message", "assistant", video.id)
    assert message.content[0].text == chat.choices[0].message.content
    assert message.usage.input_tokens == chat.usage.prompt_tokens
    assert message.model_extra["f2l"] == chat.model_extra["f2l"]
    assert ask(client, "base").content[0].text != message.content[0].text


def test_streamed_the_same(client, video):
    whole = ask(client, video.id)
    with client.messages.stream(model=video.id, messages=QUESTION, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert (text, final.model) == (whole.content[0].text, video.id)
    assert (final.usage.output_tokens, final.stop_reason) == (whole.usage.output_tokens, whole.stop_reason)
    assert final.model_extra["f2l"] == whole.model_extra["f2l"]


def test_tokens_are_counted_as_they_will_be_used(client, video):
    counted = client.messages.count_tokens(model=video.id, messages=QUESTION)
    assert counted.input_tokens == ask(client, video.id).usage.input_tokens


def refusal(call, *args, **options):
    """Status, type and code of an error in Anthropic's envelope."""
    with pytest.raises(anthropic.APIStatusError) as error:
        call(*args, **options)
    assert error.value.body["type"] == "error"
    details = error.value.body["error"]
    return error.value.status_code, details["type"], details.get("code")


def test_errors_are_anthropics_and_carry_our_codes(server, client, video, slow_clip, tmp_path):
    count = client.messages.count_tokens
    missing = (404, "not_found_error", "video_not_found")
    assert refusal(ask, client, "file-0") == missing
    assert refusal(count, model="file-0", messages=QUESTION) == missing
    frames = {"extra_body": {"f2l": {"mode": "frames"}}}
    options = (400, "invalid_request_error", "invalid_f2l_options")
    assert refusal(ask, client, video.id, **frames) == options
    assert refusal(count, model=video.id, messages=QUESTION, **frames) == options
    unread = tmp_path / "unread.mp4"
    unread.write_bytes(slow_clip.read_bytes() + b"\0")  # other bytes than those that other tests upload
    slow = server.client.files.create(file=unread, purpose="vision")
    with pytest.raises(anthropic.ConflictError) as error:
        ask(client, slow.id, extra_headers={"X-F2L-Wait": "none"})
    assert error.value.body["error"]["code"] == "video_not_ready"
    headers = error.value.response.headers
    assert (headers["X-F2L-File"], headers["X-Should-Retry"]) == (slow.id, "false")
    assert count(model=slow.id, messages=QUESTION).input_tokens > 0  # needs no adapter
    server.client.files.delete(slow.id)


def test_a_video_in_a_message_is_refused_and_not_left_unread(client, video):
    question = {"type": "text", "text": "What is shown?"}
    source = {"type": "file", "file_id": video.id}
    document = {"role": "user", "content": [{"type": "document", "source": source}, question]}
    assert refusal(ask, client, "base", [document])[0] == 400
    part = {"type": "file", "file": {"file_id": video.id}}
    result = {"type": "tool_result", "tool_use_id": "call-1", "content": [part]}
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "call-1", "name": "look", "input": {}}]}
    nested = [*QUESTION, call, {"role": "user", "content": [result]}]
    assert refusal(ask, client, "base", nested)[2] == "route_without_videos"
