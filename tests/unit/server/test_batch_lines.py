"""What a batch's input may hold: each fault is named with its line."""

import json

import pytest

from f2l_vllm.server.batches import lines
from f2l_vllm.server.batches.lines import Requests

CHAT = "/v1/chat/completions"


def request(custom_id="one", **changes):
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"model": "base"}, **changes}


def read(tmp_path, *texts, max_bytes=1000):
    path = tmp_path / "input"
    path.write_bytes(b"\n".join(text if isinstance(text, bytes) else json.dumps(text).encode() for text in texts))
    return Requests(path, CHAT, max_bytes)


def test_lines_are_read_where_they_are(tmp_path):
    body = {"model": "é", "f2l": {"mode": "frames", "wait": 600}}
    requests = read(tmp_path, request("a"), b"  ", b"", request("b", body=body), b"")
    assert requests.faults == []
    assert [(line.number, line.custom_id) for line in requests.lines] == [(1, "a"), (4, "b")]
    assert [json.loads(requests.body(line)) for line in requests.lines] == [
        {"model": "base"},
        {"model": "é", "f2l": {"mode": "frames"}},  # a batch waits by itself
    ]
    requests.close()


@pytest.mark.parametrize(
    ("line", "code", "word"),
    [
        (b"{", "invalid_json", "The line cannot be read as JSON"),
        (b'{"a": "\xff"}', "invalid_json", "UTF-8"),
        (b"[" * 200 + b"]" * 200, "request_too_complex", "nesting"),
        ([], "invalid_request", "body, custom_id, method, url"),
        ({"custom_id": "x"}, "invalid_request", "keys"),
        ({**request("x"), "more": 1}, "invalid_request", "keys"),
        (request(""), "invalid_request", "1 to 512"),
        (request(7), "invalid_request", "string"),
        (request("x", method="GET"), "invalid_request", "POST"),
        (request("x", url="/v1/responses"), "invalid_request", CHAT),
        (request("x", body=[]), "invalid_request", "object"),
        (request("x", body={"stream": True}), "unsupported_field", "stream"),
        (request("x", body={"background": True}), "unsupported_field", "background"),
        (request("x", body={"model": "b" * 1000}), "request_too_large", "MB at most"),
        (request("one"), "duplicate_custom_id", "Line 1"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path, line, code, word):
    requests = read(tmp_path, request("one"), b"", line)
    (fault,) = requests.faults
    assert (fault["line"], fault["code"]) == (3, code)
    assert word in fault["message"]


def test_no_lines_too_many_lines_and_too_many_faults(tmp_path, monkeypatch):
    assert read(tmp_path, b"", b" ").faults[0]["code"] == "empty_file"
    monkeypatch.setattr(lines, "MAX_LINES", 2)
    assert read(tmp_path, request("a"), request("b"), b"").faults == []
    assert [one["code"] for one in read(tmp_path, *(request(str(n)) for n in range(9))).faults] == ["too_many_lines"]
    assert len(read(tmp_path, *[b"{"] * 60).faults) == 50
