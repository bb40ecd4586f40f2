"""Inputs that once were answered wrongly: each gets its own refusal, and no connection is lost over it."""

import asyncio
import json

import httpx
import pytest

from f2l_vllm.server.errors import messages_kind
from tests.soak.fuzz.judge import fault
from tests.soak.fuzz.wire import Input, send
from tests.support import ROOT

LINES = [
    json.loads(line)
    for path in sorted((ROOT / "tests" / "soak" / "fuzz" / "corpus").glob("*.jsonl"))
    for line in path.read_text().splitlines()
]


@pytest.mark.parametrize("line", LINES, ids=[line["name"] for line in LINES])
def test_a_known_input(server, line):
    given = Input.from_json(line)
    answer = asyncio.run(send(httpx.URL(server.url).port, "none", given, 120))
    assert fault(given, answer) is None, answer
    assert answer.status == line["status"], answer
    error = json.loads(answer.body)["error"]
    assert error["message"]
    if "code" in line:
        assert error["code"] == line["code"], answer.body
    if given.path == "/v1/messages":  # the envelope of another API
        assert json.loads(answer.body)["type"] == "error"
        assert error["type"] == messages_kind(line["status"])
    else:
        assert {"message", "type", "param", "code"} <= set(error)


def test_the_connection_is_kept_over_every_refusal(server):
    """A client that sends its next question on the same connection is answered."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for line in LINES:
            if line["method"] == "POST" and line["path"].startswith("/v1/chat") and line["status"] == 400:
                headers = {name: value.encode() for name, value in line["headers"].items()}
                client.post(line["path"], content=line["body"].encode("latin-1"), headers=headers)
                assert client.get("/health").status_code == 200
