import json

import pytest

from f2l_vllm.cluster.question import key


def asked(*files, model=None, **more):
    parts = [{"type": "file", "file": {"file_id": name, **more}} for name in files]
    return json.dumps(
        {"model": model, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]}
    )


def test_a_question_has_the_key_of_its_videos_however_it_names_them():
    assert key(b'{"model": "file-a"}') == key(asked("file-a").encode()) == "file-a"
    assert key(asked("file-a", model="file-a", f2l={"start": 1}).encode()) == "file-a"
    assert key(asked("file-b", "file-a").encode()) == "file-b file-a"
    url = {"type": "video_url", "video_url": {"url": "http://v"}}
    assert key(json.dumps({"messages": [{"content": [url]}]}).encode()) == "http://v"
    part = {"type": "input_file", "file_id": "file-a"}
    assert key(json.dumps({"input": [{"content": [part]}]}).encode()) == "file-a"
    assert key(b'{"model": "file-a", "input": "What is shown?"}') == "file-a"


UNREADABLE = (b"", b"{", b"[" * 100_000, b"\xff", b'{"messages": [{"content": [{"type": "file", "file": {}}]}]}')


@pytest.mark.parametrize(
    "body", [b"[]", b'{"model": 3, "messages": 4}', b'{"model": "base", "messages": []}', *UNREADABLE]
)
def test_what_names_no_video_or_cannot_be_read_has_no_key(body):
    assert key(body) == ""
