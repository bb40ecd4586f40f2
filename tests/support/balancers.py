"""The load balancers of `launch/`, before small HTTP servers that stand for `f2l-vllm serve`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dns.message
import dns.rrset
import httpx

from f2l_vllm.server_process import free_port
from tests.support import ROOT

BY_NAME = "haproxy by name"  # looks its servers up, as in Kubernetes
CONFIGS = {"haproxy": "haproxy.cfg", BY_NAME: "haproxy.cfg", "nginx": "nginx.conf", "envoy": "envoy.yaml"}
PORTS = (8001, 8002, 8003, 8080)  # of the servers and of the balancer, in every configuration
_START_SECONDS = 60.0
# nginx makes these folders when it starts, where only root may.
_FOLDERS = "".join(f"    {kind}_temp_path {kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))


class StandIn:
    """Answers with its number, questions with `status`; has a loopback address of its own.

    `gate` is acquired before each of three events of a question with `stream`, and before the answer to one with
    `hold`, or to `/hold`. `port`: 0 for any.
    """

    def __init__(self, number: int, port: int = 0) -> None:
        self.number, self.gate, self.status = number, threading.Semaphore(0), 200
        self.asked = self.held = self.received = 0  # questions, requests that wait for the gate, bytes of an upload
        self.connections: set[socket.socket] = set()
        self.host = f"127.0.0.{number + 2}"
        self._server = ThreadingHTTPServer((self.host, port), type("Handler", (_Handler,), {"stand_in": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def hold(self) -> None:
        """Wait for the gate."""
        self.held += 1
        self.gate.acquire()
        self.held -= 1

    def kill(self) -> None:
        """As a process that is killed: its port and all its connections close at once."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.socket.close()
            for connection in list(self.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.gate.release(1000)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stand_in: StandIn

    def handle(self) -> None:
        self.stand_in.connections.add(self.request)
        with contextlib.suppress(OSError):  # killed, or the client is gone
            super().handle()
        self.stand_in.connections.discard(self.request)

    def do_GET(self) -> None:
        if self.path == "/hold":
            self.stand_in.hold()
        self._answer(200)

    def do_POST(self) -> None:
        length, body = int(self.headers["Content-Length"]), b""
        while len(body) < length and (piece := self.rfile.read1(length - len(body))):
            body += piece
            self.stand_in.received = len(body)
        if self.path == "/v1/files":
            return self._answer(200, bytes=len(body))
        question = json.loads(body)
        self.stand_in.asked += 1
        if self.stand_in.status == 200 and question.get("stream"):
            return self._stream()
        if question.get("hold"):
            self.stand_in.hold()
        self._answer(self.stand_in.status, bytes=len(body))

    def _stream(self) -> None:
        is_chunked = self.request_version == "HTTP/1.1"  # with 1.0 the end of the connection ends the stream
        self.close_connection = self.close_connection or not is_chunked
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(3):
            self.stand_in.hold()
            event = f"data: {number}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event) if is_chunked else event)
        if is_chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _answer(self, status: int, **more: Any) -> None:
        payload = json.dumps({"server": self.stand_in.number, **more}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        if status == 503:
            self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


class Names:
    """A DNS server that has the addresses of `servers` under every name."""

    def __init__(self, servers: list[StandIn]) -> None:
        self.servers = servers
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            packet, client = self._socket.recvfrom(8192)
            query = dns.message.from_wire(packet)
            answer, asked = dns.message.make_response(query), query.question[0]
            if asked.rdtype == dns.rdatatype.A:
                addresses = [server.host for server in self.servers]
                answer.answer = [dns.rrset.from_text_list(asked.name, 1, "IN", "A", addresses)]
            self._socket.sendto(answer.to_wire(), client)


def find(name: str) -> str | None:
    """The program, on the PATH or where Debian puts it."""
    return shutil.which(name.split()[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextlib.contextmanager
def balanced(name: str, folder: Path, servers: list[StandIn]) -> Iterator[str]:
    """The URL of a balancer of `CONFIGS`, with its configuration of `launch/` but for the ports."""
    program, text = find(name), (ROOT / "launch" / CONFIGS[name]).read_text()
    assert program is not None
    port = free_port()
    used = [*((server.host, server.port) for server in servers), ("127.0.0.1", port)]
    for known, (host, own) in zip(PORTS, used, strict=True):
        for between in (":", ", port_value: "):
            text = text.replace(f"127.0.0.1{between}{known}", f"{host}{between}{own}")
    environment = dict(os.environ)
    if name == BY_NAME:
        text = text.replace("parse-resolv-conf", f"nameserver test 127.0.0.1:{Names(servers).port}")
        environment["SERVERS"] = f"servers.test:{servers[0].port}"
    config = folder / CONFIGS[name]
    config.write_text(text.replace("http {\n", f"http {{\n{_FOLDERS}") if name == "nginx" else text)
    owner = "user root;" if os.getuid() == 0 else ""  # may read the folder
    arguments: dict[str, list[str | Path]] = {
        "haproxy": ["-f", config],
        BY_NAME: ["-f", config],
        "nginx": ["-p", folder, "-c", config, "-g", f"daemon off; pid nginx.pid; error_log stderr; {owner}"],
        "envoy": ["-c", config, "--concurrency", "1", "--disable-hot-restart", "--log-level", "warn"],
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, *arguments[name]], stdout=log, stderr=log, env=environment)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + _START_SECONDS
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").is_success
    except httpx.TransportError:
        return False
