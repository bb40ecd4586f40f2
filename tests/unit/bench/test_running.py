"""A server that runs already: what it must be, what it says of itself, and what of a suite it cannot show."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from f2l_vllm.bench import record, running
from f2l_vllm.bench import suite as suites
from f2l_vllm.cli.main import app
from f2l_vllm.server_process import ServerFailed, free_port

CARD = {"data": [{"id": "base", "max_model_len": 2048}]}
METRICS = 'vllm:cache_config_info{block_size="16",enable_prefix_caching="True"} 1.0\nf2l_workers 2.0\n'
READY = {"/ready": (200, {"ready": True}), "/v1/models": (200, CARD)}


@pytest.fixture
def pages() -> Iterator[tuple[str, dict]]:
    """A server's URL, and what it answers at each path: status and body; 404 elsewhere."""
    answers: dict[str, tuple[int, object]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            status, body = answers.get(self.path.partition("?")[0], (404, "no such page"))
            if status == 200 and self.path.startswith("/v1/") and self.headers["Authorization"] != "Bearer good":
                status, body = 401, {"error": {"code": "invalid_api_key"}}
            payload = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_says_what_it_is(pages) -> None:
    url, answers = pages
    answers |= READY
    assert running.reach(f"{url}/v1/", "good").facts == {
        **{"url": url, "model": "base", "max_model_len": 2048, "f2l_vllm": None, "vllm": None},
    }
    answers["/console/about"] = 200, {"version": "1.2", "kv_bytes_per_token": 64}
    answers |= {"/version": (200, {"version": "0.32.0"}), "/metrics": (200, METRICS)}
    found = running.reach(url, "good")
    assert (found.url, found.name, found.kv_bytes_per_token) == (url, "base", 64)
    assert {"f2l_vllm": "1.2", "vllm": "0.32.0", "workers": 2, "enable_prefix_caching": "True"}.items() <= (
        found.facts.items()
    )
    assert "good" not in f"{found}{found.facts}"


def test_what_cannot_be_asked_is_told_apart(pages, tmp_path: Path) -> None:
    url, answers = pages

    def refused(at: str = url, key: str = "good") -> str:
        with pytest.raises(ServerFailed) as raised:
            running.reach(at, key)
        return str(raised.value)

    assert "no server of f2l-vllm: GET /ready is answered with 404" in refused()
    answers["/ready"] = 503, {"ready": False, "engine": True, "workers": False, "why": {"workers": "loading"}}
    assert "is not ready (workers: loading)" in refused()
    answers |= READY
    assert "refuses the key: give one that it knows with --api-key or OPENAI_API_KEY" in refused(key="bad")
    answers["/v1/models"] = 200, {"data": []}
    assert "does not say which model it serves" in refused()
    nobody = f"http://127.0.0.1:{free_port()}"
    assert f"no server answers at {nobody}" in refused(nobody)
    assert "is no address of a server" in refused("http://a:b")

    words = ["bench", "latency", "--base-url", nobody, "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, "start one with 'f2l-vllm serve'" in done.output) == (1, True)
    done = CliRunner().invoke(app, [*words, "--shape", "tiny"], env={"COLUMNS": "200"})
    assert (done.exit_code, "leave out --model and --shape" in done.output) == (2, True)
    assert not (tmp_path / "out.json").exists()


def test_what_a_server_cannot_show_is_left_out_and_said(pages, tmp_path: Path) -> None:
    url, answers = pages
    answers |= READY
    answers["/v1/chat/completions"] = 400, {"error": {"message": "At most 0 videos"}}  # it takes no frames
    server = running.reach(url, "good")
    told: list[str] = []

    def measurable(name: str, **keys: object) -> dict:
        suite = suites.load(name, {"base_url": url, **keys})
        assert isinstance(suite, suites.OfVideos | suites.Ramp)
        return asyncio.run(running.measurable(suite, server, tmp_path, told.append))

    assert measurable("latency") == {"arms": ("adapter", "adapter-cold"), "frames": (8, 16, 32)}
    assert told[0].startswith("left out: frames-cached, ")
    assert told[1].startswith("left out: frames, which this server does not take (Error code: 400")
    assert told[2] == "left out: 64, 128, 256, 512, 1024 frames, above count_above=32"
    for arms in ("frames", "frames-cached"):
        with pytest.raises(ValueError, match="its arms are adapter, adapter-cold, frames, text"):
            measurable("amortise", arms=arms)
    told.clear()
    assert measurable("ramp") == {}
    assert not told


@pytest.mark.parametrize("given", [["--api-key", "secret"], ["--api-key=secret"]])
def test_a_result_does_not_hold_the_key(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["f2l-vllm", "bench", "ramp", *given, "--resume"])
    command = record.header({})["command"]
    assert "secret" not in command
    assert command.endswith("--resume")
