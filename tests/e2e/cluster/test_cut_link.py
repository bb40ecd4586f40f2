"""A machine vanishes from the network without a word: what HAProxy had sent it is asked again elsewhere."""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from benchmarks.haproxy import find_haproxy, proxied
from benchmarks.namespaces import Network, alone
from tests.support import ROOT

_NEEDS = os.getuid() == 0 and os.path.exists("/dev/net/tun") and find_haproxy() is not None
_QUESTION = {"model": "file-1"}
_SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(sys.argv[1])))
        self.end_headers()
        self.wfile.write(sys.argv[1].encode())
    def log_message(self, *_): pass
ThreadingHTTPServer((sys.argv[1], 8000), Handler).serve_forever()
"""


@pytest.mark.skipif(not _NEEDS, reason="needs root, /dev/net/tun and HAProxy")
def test_a_question_on_a_connection_to_a_machine_that_has_vanished_is_answered_by_another():
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=110
    )
    assert done.returncode == 0


def main() -> None:
    """Two machines behind HAProxy, one of which is cut off after it has answered on a connection that stays open."""
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
        while client.post("/v1/chat/completions", json=_QUESTION).status_code != 200:
            time.sleep(0.5)  # HAProxy has not seen the servers yet
        time.sleep(3)
        home = client.post("/v1/chat/completions", json=_QUESTION).raise_for_status().text
        machines[home].cut()
        other = client.post("/v1/chat/completions", json=_QUESTION).raise_for_status().text
        assert {home, other} == machines.keys(), (home, other)


if __name__ == "__main__":
    main()
