"""What a JSON body may hold."""

import pytest

from f2l_vllm.server.errors import APIError
from f2l_vllm.server.middleware import json_bodies


def nested(depth, opening="[", closing="]"):
    return (opening * depth + closing * depth).encode()


@pytest.mark.parametrize(
    "body",
    [b"{}", b"[1, -2.5e3, true, null]", '{"a": "\u00e9\U0001f600"}'.encode(), b'"\\ud83d\\ude00"', nested(90)],
)
def test_ordinary_json_is_read(body):
    import json

    assert json_bodies.parse(body) == json.loads(body)


@pytest.mark.parametrize(
    ("body", "code"),
    {
        "cut short": (b'{"a": ', "invalid_json"),
        "not UTF-8": (b'{"a": "\xff"}', "invalid_json"),
        "UTF-16": ('{"a": 1}'.encode("utf-16"), "invalid_json"),
        "half a character": (b'{"a": ["\\ud800"]}', "invalid_json"),
        "half a character in a key": (b'{"\\udfff": 1}', "invalid_json"),
        "raw half of a character": (b'{"a": "\xed\xa0\x80"}', "invalid_json"),
        "NaN": (b'{"a": NaN}', "invalid_json"),
        "Infinity": (b'{"a": -Infinity}', "invalid_json"),
        "a float beyond doubles": (b'{"a": 1e400}', "invalid_json"),
        "10**400": (b'{"a": 1' + b"0" * 400 + b"}", "invalid_json"),
        "10**5000": (b'{"a": 1' + b"0" * 5000 + b"}", "invalid_json"),
        "2**64": (b'{"a": [18446744073709551616]}', "invalid_json"),
        "330 levels": (nested(330), "request_too_complex"),
        "330 objects": (b'{"a":' * 330 + b"1" + b"}" * 330, "request_too_complex"),
        "a million levels": (nested(100_000), "request_too_complex"),
        "a million values": (b"[" + b"1," * 1_000_000 + b"1]", "request_too_complex"),
    }.values(),
)
def test_what_no_handler_could_read_is_refused(body, code):
    with pytest.raises(APIError) as error:
        json_bodies.parse(body)
    assert (error.value.status, error.value.code) == (400, code)
    assert "Traceback" not in error.value.message
    assert len(error.value.message) < 300
