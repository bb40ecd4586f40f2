"""Spans are made, hang together across processes and threads, and cost nothing while nobody collects them."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from f2l_vllm import tracing
from tests.support import ROOT
from tests.support.collector import Collector, attributes

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"

OFF = """
import sys
from f2l_vllm import tracing
from f2l_vllm.pool import trail
tracing.start("pool")
with tracing.span("upload") as span:
    assert (span, tracing.traceparent()) == (None, None)
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
ON = """
import threading, sys
from f2l_vllm import tracing
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Job
from f2l_vllm.pool.messages import Failed, Progress
from f2l_vllm.pool.trail import Trail
tracing.start("pool")
with tracing.span("upload", sys.argv[1], request_id="r"):
    upload = tracing.traceparent()
trail = Trail()
job, silent = Job("f2l-a", "a", 2, token="t", trace=upload), Job("f2l-b", "b", 1)
for state in (VideoState.DECODING, VideoState.DECODING, VideoState.ENCODING, VideoState.PUBLISHING):
    for one in (job, silent):
        trail.note(one, Progress(state, 0.5))
trail.note(job, Failed("video_lost", "it is gone"))
trail.note(job, Progress(VideoState.DECODING, 0.0))
trail.end()
try:
    with tracing.span("load", upload):
        raise ValueError("no")
except ValueError:
    pass
"""


@pytest.fixture
def collector():
    found = Collector()
    yield found
    found.close()


def run(program, *words, **environment):
    environment = {**os.environ, **environment}
    subprocess.run([sys.executable, "-c", program, *words], env=environment, cwd=ROOT, check=True, timeout=120)


def test_nothing_is_imported_while_nobody_collects():
    run(OFF, **{tracing.ENDPOINT: ""})


def test_what_becomes_of_an_upload_hangs_below_it(collector):
    run(ON, PARENT, **collector.environment)
    spans = collector.spans
    assert {span.trace_id.hex() for span in spans} == {"a" * 32}
    upload, *rest = sorted(spans, key=lambda span: span.start_time_unix_nano)
    assert (upload.name, upload.parent_span_id.hex()) == ("upload", "b" * 16)
    assert attributes(upload) == {"f2l.request_id": "r"}
    assert [span.name for span in rest] == ["decode", "read", "publish", "decode", "load"]
    assert {span.parent_span_id for span in rest} == {upload.span_id}
    decode, read, publish, again, load = rest
    assert attributes(decode) == {"f2l.adapter": "f2l-a", "f2l.attempt": 2}
    assert decode.end_time_unix_nano <= read.start_time_unix_nano
    assert [attributes(span).get("error.type") for span in (read, publish, again)] == [None, "video_lost", "given_up"]
    assert [event.name for event in load.events] == ["exception"]


def test_an_answer_is_a_span_to_its_end_and_the_app_behind_finds_it(collector):
    program = """
import asyncio, sys
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient
from f2l_vllm import tracing
from f2l_vllm.server.middleware.traced import Traced

async def app(scope, receive, send):
    async def pieces():
        with tracing.span("inner"):
            yield Request(scope).headers["traceparent"] if "traceparent" in Request(scope).headers else "none"
    await StreamingResponse(pieces(), 201)(scope, receive, send)

tracing.start("server")
client = TestClient(Traced(app))
assert client.get("/v1/files").text == client.post("/v1/uploads").text == "none"
assert client.post("/v1/uploads/upload_1/complete").text != "none"
asked = client.post("/v1/chat/completions", headers={"traceparent": sys.argv[1]})
print(asked.text)
"""
    environment = {**os.environ, **collector.environment}
    command = [sys.executable, "-c", program, PARENT]
    said = subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120, capture_output=True, text=True)
    spans = collector.of_trace("a" * 32, lambda found: len(found) == 2)
    answer, inner = spans["answer"], spans["inner"]
    assert said.stdout.strip() == f"00-{'a' * 32}-{answer.span_id.hex()}-01"
    assert (answer.parent_span_id.hex(), inner.parent_span_id) == ("b" * 16, answer.span_id)
    assert inner.end_time_unix_nano <= answer.end_time_unix_nano
    assert attributes(answer) == {"http.response.status_code": 201}


def test_vllm_reads_the_same_header_and_variables():
    from vllm.tracing import otel, utils

    assert tracing.HEADER in utils.TRACE_HEADERS
    source = Path(otel.__file__).read_text()
    assert f'os.environ["{tracing.ENDPOINT}"] = otlp_traces_endpoint' in source
    assert otel.OTEL_EXPORTER_OTLP_TRACES_PROTOCOL == tracing.PROTOCOL


def test_without_a_collector_requests_go_through_untouched(monkeypatch):
    from f2l_vllm.server.middleware.traced import Traced

    monkeypatch.delenv(tracing.ENDPOINT, raising=False)
    seen = []

    async def app(scope, _receive, _send):
        seen.append(scope["headers"])

    scope = {"type": "http", "method": "POST", "path": "/v1/files", "headers": [(b"traceparent", PARENT.encode())]}
    asyncio.run(Traced(app)(scope, None, None))
    assert seen == [[(b"traceparent", PARENT.encode())]]
