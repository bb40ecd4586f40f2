import base64

import pytest

from f2l_vllm.serving.errors import APIError
from f2l_vllm.serving.questions import file_ids, options, with_frames, without_videos


def part(file_id):
    return {"type": "file", "file": {"file_id": file_id}}


TEXT = {"type": "text", "text": "What is shown?"}


def test_options_come_from_body_before_header_before_default():
    assert options(None, {}, 30).wait == 30
    assert options(None, {"x-f2l-wait": "2.5"}, 30).wait == 2.5
    assert options({"f2l": {"wait": "none"}}, {"x-f2l-wait": "2.5"}, 30).wait == 0
    assert options({}, {}, 30).mode == "adapter"
    assert options({"f2l": {"mode": "frames"}}, {}, 30).mode == "frames"


@pytest.mark.parametrize("wait", ["nan", "inf", "-1", "3601", "later"])
def test_waits_that_are_no_time_are_refused(wait):
    with pytest.raises(APIError, match="wait must be"):
        options(None, {"x-f2l-wait": wait}, 30)


def test_file_ids_in_order_each_once():
    messages = [
        {"role": "user", "content": [part("file-b"), TEXT]},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": [part("file-a"), part("file-b"), TEXT]},
    ]
    assert file_ids(messages) == ["file-b", "file-a"]


def test_only_the_video_is_taken_out():
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [part("file-a"), image, TEXT]}]
    assert without_videos(messages) == [messages[0], {"role": "user", "content": [image, TEXT]}]
    assert len(messages[1]["content"]) == 3  # the request itself is not changed


def test_frames_take_the_place_of_the_file_part_or_go_first(tmp_path):
    path = tmp_path / "video"
    path.write_bytes(b"bytes")
    url = "data:video/mp4;base64," + base64.b64encode(b"bytes").decode()
    video = {"type": "video_url", "video_url": {"url": url}}
    placed = with_frames([{"role": "user", "content": [TEXT, part("file-a")]}], "file-a", path)
    assert placed == [{"role": "user", "content": [TEXT, video]}]
    first = with_frames([{"role": "user", "content": "What is shown?"}], "file-a", path)
    assert first == [{"role": "user", "content": [video, TEXT]}]
