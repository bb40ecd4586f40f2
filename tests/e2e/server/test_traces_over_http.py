"""One trace from an upload to its answer, over a real server, its pool and its engine."""

import secrets

from f2l_vllm.client import upload
from tests.support.collector import attributes
from tests.support.videos import write_video

OURS = {"upload", "decode", "read", "publish", "load", "answer"}


def test_a_clients_trace_has_the_upload_its_adapter_and_the_answer(other_server, collector, tmp_path):
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "of-the-trace"}
    client = other_server.client.with_options(default_headers=headers)
    [file] = upload(client, write_video(tmp_path / "new.mp4", frames=33, fps=11))
    question = [{"role": "user", "content": "What is shown?"}]
    answer = client.chat.completions.create(model=file.id, messages=question, max_tokens=3, stream=True)
    pieces = [piece for piece in answer if piece.choices]
    spans = collector.of_trace(trace, lambda found: {*found} >= OURS | {"llm_request"})
    assert {*spans} == OURS | {"llm_request"}
    parents = {name: span.parent_span_id for name, span in spans.items()}
    uploaded, answered = spans["upload"], spans["answer"]
    assert parents["upload"] == parents["answer"] == bytes.fromhex(parent)
    assert {parents[name] for name in ("decode", "read", "publish")} == {uploaded.span_id}
    assert {parents[name] for name in ("load", "llm_request")} == {answered.span_id}
    in_order = [spans[name] for name in ("upload", "decode", "read", "publish", "load")]
    assert in_order == sorted(in_order, key=lambda span: span.start_time_unix_nano)
    assert spans["publish"].end_time_unix_nano <= answered.start_time_unix_nano
    assert attributes(answered) == {"f2l.request_id": "of-the-trace", "http.response.status_code": 200}
    assert attributes(spans["llm_request"])["gen_ai.request.id"] == pieces[0].id
    assert file.model_extra["f2l"]["adapter"] == attributes(spans["decode"])["f2l.adapter"]
