"""A machine vanishes from the network without a word: what HAProxy or a front had sent it is asked again elsewhere."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from benchmarks.haproxy import find_haproxy, proxied
from benchmarks.namespaces import Network, alone
from f2l_vllm.cluster.membership import Membership
from f2l_vllm.cluster.relay import Engine, Relay
from tests.support import ROOT
from tests.unit.cluster.test_relay import events, serving

_NEEDS = os.getuid() == 0 and os.path.exists("/dev/net/tun") and find_haproxy() is not None
_PATH, _QUESTION = "/v1/chat/completions", {"model": "file-1"}
_SERVER = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        if b"stream" not in self.rfile.read(int(self.headers["Content-Length"])):
            return self.do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"9\\r\\ndata: 0\\n\\n\\r\\n")
        time.sleep(100)
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(sys.argv[1])))
        self.end_headers()
        self.wfile.write(sys.argv[1].encode())
    def log_message(self, *_): pass
ThreadingHTTPServer((sys.argv[1], 8000), Handler).serve_forever()
"""


@pytest.mark.skipif(not _NEEDS, reason="needs root, /dev/net/tun and HAProxy")
def test_what_a_machine_that_has_vanished_was_asked_is_answered_by_another_and_its_stream_ends_with_an_error():
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=110
    )
    assert done.returncode == 0


def main() -> None:
    """Two machines behind HAProxy and behind a front. One is cut off after it has answered on connections that stay
    open, and in the middle of a stream."""
    alone()
    network = Network()
    machines = {machine.address: machine for machine in (network.machine(), network.machine())}
    with ExitStack() as stack:
        for address, machine in machines.items():
            command = ["ip", "netns", "exec", machine.name, sys.executable, "-c", _SERVER, address]
            stack.callback(subprocess.Popen(command).kill)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        socket = stack.enter_context(proxied([f"{address}:8000" for address in machines], folder))
        transport = httpx.HTTPTransport(uds=str(socket))
        client = stack.enter_context(httpx.Client(transport=transport, base_url="http://haproxy", timeout=60))
        while client.post(_PATH, json=_QUESTION).status_code != 200:
            time.sleep(0.5)  # HAProxy has not seen the servers yet
        time.sleep(3)
        home = client.post(_PATH, json=_QUESTION).raise_for_status().text
        (other,) = machines.keys() - {home}

        async def choose(_: str, tried: Collection[str]) -> Engine:
            name = other if home in tried else home
            return Engine(name, f"http://{name}:8000")

        url = stack.enter_context(serving(Relay(choose, Membership()).app()))
        fronted = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        stream = stack.enter_context(fronted.stream("POST", _PATH, json={**_QUESTION, "stream": True}))
        assert fronted.post(_PATH, json=_QUESTION).text == home
        machines[home].cut()
        with ThreadPoolExecutor() as pool:
            ending = pool.submit(stream.read)
            answers = [pool.submit(one.post, _PATH, json=_QUESTION) for one in (client, fronted)]
            assert [answer.result().raise_for_status().text for answer in answers] == [other, other]
            ending.result()
        first, error = events(stream)
        assert (first, json.loads(error)["error"]["code"]) == ("0", "engine_lost")


if __name__ == "__main__":
    main()
