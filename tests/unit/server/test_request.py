import math

import pytest

from f2l_vllm.server.chat.request import Span, Video, names_a_video, options, videos, with_frames, without_videos
from f2l_vllm.server.errors import APIError


def part(file_id, **details):
    return {"type": "file", "file": {"file_id": file_id, **details}}


def url_part(url, **details):
    return {"type": "video_url", "video_url": {"url": url, **details}}


def user(*parts):
    return {"role": "user", "content": list(parts)}


TEXT = {"type": "text", "text": "What is shown?"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def test_options_come_from_body_before_header_before_default():
    assert options(None, {}, 30).wait == 30
    assert options(None, {"x-f2l-wait": "2.5"}, 30).wait == 2.5
    assert options({"f2l": {"wait": "none"}}, {"x-f2l-wait": "2.5"}, 30).wait == 0
    assert options({}, {}, 30).mode == "adapter"
    assert options({"f2l": {"mode": "both"}}, {}, 30).mode == "both"


@pytest.mark.parametrize("given", [{"mode": "frame"}, {"Mode": "frames"}, {"waits": 1}, "frames", ["frames"]])
def test_options_that_nobody_would_read_are_refused(given):
    with pytest.raises(APIError) as error:
        options({"f2l": given}, {}, 30)
    assert error.value.code == "invalid_f2l_options"


@pytest.mark.parametrize("wait", ["nan", "inf", "-1", "3601", "later"])
def test_waits_that_are_no_time_are_refused(wait):
    with pytest.raises(APIError, match="wait must be"):
        options(None, {"x-f2l-wait": wait}, 30)


def test_videos_of_every_message_in_order_each_once():
    messages = [
        {"role": "system", "content": [part("file-s"), TEXT]},
        user(part("file-b"), TEXT),
        {"role": "assistant", "content": [part("file-c"), TEXT]},
        user(url_part("https://a.example/v.mp4"), part("file-b"), TEXT),
    ]
    named = [Video("file-s"), Video("file-b"), Video("file-c"), Video(url="https://a.example/v.mp4")]
    assert videos("base", messages) == named
    assert videos("file-m", messages) == [Video("file-m"), *named]
    assert videos("file-b", messages) == named
    assert videos(None, [{"role": "user", "content": "Hello."}]) == []


def test_spans_belong_to_their_parts():
    messages = [user(part("file-a", f2l={"start": 30, "end": 90}), part("file-a", f2l={"start": 200}), TEXT)]
    asked = [Video("file-a", span=Span(30, 90)), Video("file-a", span=Span(200, math.inf))]
    assert videos("base", messages) == asked
    assert videos("file-a", messages) == asked  # the parts say what of the model's own video is meant
    assert videos("base", [user(url_part("data:,x", f2l={"end": 5}), TEXT)]) == [Video(url="data:,x", span=Span(0, 5))]


@pytest.mark.parametrize(
    "span",
    [
        {"strat": 3},
        {"start": 3, "end": 3},
        {"start": 5, "end": 3},
        {"start": -1},
        {"start": "3"},
        {"start": True},
        {"end": math.nan},
        {"start": math.inf},
        [3, 5],
        "3-5",
    ],
)
def test_spans_that_are_none_are_refused(span):
    with pytest.raises(APIError) as error:
        videos("base", [user(part("file-a", f2l=span), TEXT)])
    assert (error.value.code, error.value.status) == ("invalid_span", 400)


def test_bytes_in_a_file_part_are_a_data_uri_under_any_name():
    def inline(file_data, **details):
        return {"type": "file", "file": {"file_data": file_data, **details}}

    parts = (
        inline("data:video/mp4;base64,AAAA", filename="a.mp4", file_id=None),
        url_part("data:video/mp4;base64,AAAA"),
        inline("BBBB", f2l={"end": 5}),
    )
    first, second = videos("base", [user(*parts, TEXT)])
    assert (first, first.filename) == (Video(url="data:video/mp4;base64,AAAA"), "a.mp4")
    assert second == Video(url="data:;base64,BBBB", span=Span(0, 5))
    assert without_videos([user(*parts, TEXT)]) == [user(TEXT)]


def test_videos_as_the_responses_api_names_them():
    parts = (
        {"type": "input_file", "file_id": "file-a", "f2l": {"end": 5}},
        {"type": "input_file", "file_data": "AAAA", "filename": "a.mp4", "file_id": None},
        {"type": "input_file", "file_url": "https://a.example/v.mp4"},
    )
    text = {"type": "input_text", "text": "What is shown?"}
    named = [Video("file-a", span=Span(0, 5)), Video(url="data:;base64,AAAA"), Video(url="https://a.example/v.mp4")]
    assert videos("base", [user(*parts, text)]) == named
    assert without_videos([user(*parts, text)]) == [user(text)]
    assert all(names_a_video([{"type": "function_call_output", "output": [part]}]) for part in parts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "input_file"},
        {"type": "input_file", "file_id": "file-a", "file_url": "https://a.example/v.mp4"},
        {"type": "input_file", "file": {"file_id": "file-a"}},
        {"type": "file"},
        {"type": "file", "file": "file-a"},
        {"type": "file", "file": {"file_id": ""}},
        {"type": "file", "file": {"file_data": ""}},
        {"type": "file", "file": {"file_data": ["data:,"]}},
        {"type": "file", "file": {"file_data": "data:,", "filename": 3}},
        {"type": "file", "file": {"file_data": "data:,", "file_id": "file-a"}},
        {"type": "file", "file": {"file_id": "file-a", "start": 3}},
        {"type": "video_url", "video_url": {"uri": "data:,"}},
    ],
)
def test_parts_that_would_be_left_unread_are_refused(wrong):
    with pytest.raises(APIError) as error:
        videos("base", [user(wrong, TEXT)])
    assert error.value.code == "invalid_request"


def test_only_the_videos_are_taken_out():
    messages = [{"role": "system", "content": "Be brief."}, user(part("file-a"), IMAGE, url_part("data:,"), TEXT)]
    assert without_videos(messages) == [messages[0], user(IMAGE, TEXT)]
    assert len(messages[1]["content"]) == 4  # the request itself is not changed


def test_a_message_must_be_left_with_a_question():
    for messages, code in (([], "empty_messages"), ([user(part("file-a"))], "missing_question")):
        with pytest.raises(APIError) as error:
            without_videos(messages)
        assert error.value.code == code


def test_frames_take_the_places_of_the_parts_and_the_models_video_goes_first():
    urls = {Video("file-a"): "data:a", Video("file-b"): "data:b"}
    placed = with_frames([user(TEXT, part("file-b"), part("file-a"))], urls)
    assert placed == [user(TEXT, url_part("data:b"), url_part("data:a"))]
    first = with_frames([{"role": "user", "content": "What is shown?"}], urls)
    assert first == [user(url_part("data:a"), url_part("data:b"), TEXT)]
    mixed = with_frames([user(part("file-b"), TEXT), user(IMAGE)], urls)
    assert mixed == [user(url_part("data:b"), TEXT), user(url_part("data:a"), IMAGE)]
    with pytest.raises(APIError, match="No user message"):
        with_frames([{"role": "system", "content": "Be brief."}], urls)


def test_videos_in_the_input_of_other_routes_are_noticed():
    assert names_a_video([{"content": [{"type": "document", "source": {"type": "stored", "file_id": "file-a"}}]}])
    assert not names_a_video([{"role": "user", "content": [TEXT, IMAGE]}, "file-a"])
