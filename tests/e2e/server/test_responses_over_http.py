"""OpenAI's Responses API about videos, with the stock client."""

import base64

import openai
import pytest

from tests.support.videos import write_video

QUESTION = "What is shown in the video?"
GREEDY = {"temperature": 0, "max_output_tokens": 12}


@pytest.fixture(scope="module")
def videos(server, clips):
    return [server.upload(clip) for clip in clips[:2]]


def about(*parts, question=QUESTION):
    return [{"role": "user", "content": [*parts, {"type": "input_text", "text": question}]}]


def file_part(file_id, **details):
    return {"type": "input_file", "file_id": file_id, **details}


def ask(server, given, model="base", f2l=None, **options):
    extra = {"extra_body": {"f2l": f2l}} if f2l else {}
    return server.client.responses.create(model=model, input=given, **GREEDY, **extra, **options)


def chat(server, model, *ids, **options):
    parts = [{"type": "file", "file": {"file_id": file_id}} for file_id in ids]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
    return server.client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=12, **options
    )


def test_a_video_is_the_model_or_a_file_in_the_input(server, videos):
    expected = chat(server, videos[0].id)
    by_model = ask(server, QUESTION, model=videos[0].id)
    by_part = ask(server, about(file_part(videos[0].id)))
    assert by_model.output_text == by_part.output_text == expected.choices[0].message.content
    assert (by_model.model, by_part.model) == (videos[0].id, "base")
    assert by_model.usage.input_tokens == expected.usage.prompt_tokens
    assert by_model.model_extra["f2l"] == expected.model_extra["f2l"]
    assert ask(server, QUESTION).output_text != expected.choices[0].message.content


def test_several_are_composed(server, videos):
    ids = [video.id for video in videos]
    both = ask(server, about(*map(file_part, ids)))
    assert both.output_text == chat(server, "base", *ids).choices[0].message.content
    assert [video["file_id"] for video in both.model_extra["f2l"]["videos"]] == ids


def test_streamed_the_same(server, videos):
    whole = ask(server, about(file_part(videos[1].id)))
    asked = {"model": "base", "input": about(file_part(videos[1].id)), **GREEDY}
    with server.client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert final.model_extra["f2l"] == whole.model_extra["f2l"]


def test_bytes_in_the_input_become_a_file(server, tmp_path):
    path = write_video(tmp_path / "inline.mp4", frames=31, fps=6)
    data = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    answer = ask(server, about({"type": "input_file", "filename": "inline.mp4", "file_data": data}))
    (file_id,) = (video["file_id"] for video in answer.model_extra["f2l"]["videos"])
    assert server.client.files.retrieve(file_id).filename == "inline.mp4"
    assert ask(server, QUESTION, model=file_id).output_text == answer.output_text


@pytest.mark.parametrize("mode", ["frames", "both"])
def test_frames_in_context_on_request(server, videos, mode):
    expected = chat(server, videos[0].id, extra_body={"f2l": {"mode": mode}})
    for given in (QUESTION, about(), about(file_part(videos[0].id))):
        answer = ask(
            server, given, model="base" if given == about(file_part(videos[0].id)) else videos[0].id, f2l={"mode": mode}
        )
        assert answer.output_text == expected.choices[0].message.content
        assert answer.usage.input_tokens == expected.usage.prompt_tokens
        assert answer.model_extra["f2l"]["visual_tokens"] == expected.model_extra["f2l"]["visual_tokens"] > 0


@pytest.mark.parametrize(
    ("part", "refusal"),
    [
        ({"type": "input_file", "file_id": "file-0"}, (404, "video_not_found")),
        ({"type": "input_file", "file_url": "https://videos.example/a.mp4"}, (400, "url_not_allowed")),
        ({"type": "input_file", "file_url": "file:///etc/passwd"}, (400, "url_not_allowed")),
        ({"type": "input_file", "filename": "a.mp4"}, (400, "invalid_request")),
        ({"type": "input_file", "file_data": "!!"}, (400, "invalid_url")),
        ({"type": "input_file", "file_id": "file-0", "f2l": {"begin": 3}}, (400, "invalid_span")),
    ],
)
def test_what_cannot_be_seen_is_refused(server, part, refusal):
    with pytest.raises(openai.APIStatusError) as error:
        ask(server, about(part))
    assert (error.value.status_code, error.value.code) == refusal


def test_no_video_is_left_unread(server, videos):
    call = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "1", "output": [file_part(videos[0].id)]}
    for given in ([*about(), call, output], [*about(file_part(videos[1].id)), call, output]):
        with pytest.raises(openai.BadRequestError) as error:
            ask(server, given)
        assert error.value.code == "route_without_videos"


def test_a_server_that_stores_none_says_so(server, videos):
    answer = ask(server, QUESTION, model=videos[0].id)
    for call in (
        lambda: server.client.responses.retrieve(answer.id),
        lambda: server.client.responses.cancel(answer.id),
        lambda: ask(server, "And then?", previous_response_id=answer.id),
    ):
        with pytest.raises(openai.NotFoundError, match="stores none") as error:
            call()
        assert error.value.code == "response_not_found"
