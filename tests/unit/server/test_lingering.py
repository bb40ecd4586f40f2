"""A client that still sends when it is refused reads the answer, over real connections."""

import asyncio
import socket
import threading
import time

import pytest
import uvicorn
from starlette.responses import JSONResponse

from f2l_vllm.server.middleware import lingering
from f2l_vllm.server.middleware.auth import AuthMiddleware
from f2l_vllm.server.middleware.bodies import Bodies
from f2l_vllm.server.middleware.faults import Faults
from f2l_vllm.server.middleware.lingering import Lingering
from f2l_vllm.server.tenants import Keys

CAP = 1 << 20


async def answer(scope, receive, send):
    await JSONResponse({"path": scope["path"]})(scope, receive, send)


async def untried(constraint, tenant):
    return None


@pytest.fixture(scope="module", params=["h11", "httptools"])
def port(request):
    """Of a server that needs a key and reads at most `CAP` bytes."""
    bodies = Bodies(answer, max_body_bytes=CAP, max_images=1, has_tenants=False, check=untried)
    app = Lingering(AuthMiddleware(Faults(bodies, idle_seconds=5.0), Keys(["key"], None), []))
    config = uvicorn.Config(app, port=0, http=request.param, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def asked(port, head, body=b"", pieces=1, pause=0.0):
    """What the server answers to a client that reads only once it has sent all."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall("\r\n".join([*head, "Host: here", "", ""]).encode())
        for _ in range(pieces):
            time.sleep(pause)
            connection.sendall(body)
        found = b""
        while piece := connection.recv(1 << 16):
            found += piece
    return found


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files"])
@pytest.mark.parametrize("last", ["POST {path} HTTP/1.1|Connection: close", "POST {path} HTTP/1.0"])
def test_an_unknown_key_is_told_to_a_client_that_still_sends(port, path, last):
    head = [*last.format(path=path).split("|"), f"Content-Length: {8 << 20}"]
    found = asked(port, head, bytes(1 << 20), pieces=8, pause=0.005)
    assert found.startswith(b"HTTP/1.1 401")
    assert b"invalid_api_key" in found


def test_a_body_above_the_cap_is_told_to_a_client_that_still_sends(port):
    key = "Authorization: Bearer key"
    head = ["POST /v1/completions HTTP/1.1", "Connection: close", key]
    found = asked(port, [*head, f"Content-Length: {8 << 20}"], bytes(1 << 20), pieces=8, pause=0.005)
    assert found.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in found
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    found = asked(port, [*head, "Transfer-Encoding: chunked"], chunk, pieces=8, pause=0.005)
    assert found.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in found


def test_an_answer_arrives_before_the_rest_of_the_body(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"POST /v1/files HTTP/1.1\r\nHost: here\r\nContent-Length: 1000000\r\n\r\nab")
        assert b"invalid_api_key" in connection.recv(1 << 16)


def test_a_client_that_stops_sending_is_not_waited_for_long(port, monkeypatch):
    monkeypatch.setattr(lingering, "_IDLE_SECONDS", 0.2)
    head = ["POST /v1/files HTTP/1.1", "Connection: close", "Content-Length: 1000000"]
    assert asked(port, head, b"ab").startswith(b"HTTP/1.1 401")
    monkeypatch.setattr(lingering, "_LONGEST_SECONDS", 0.3)
    with pytest.raises(ConnectionError):
        asked(port, head, b"ab", pieces=100, pause=0.02)


def test_a_kept_connection_goes_on(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        refused = b"POST /v1/files HTTP/1.1\r\nHost: here\r\nContent-Length: 2000000\r\n\r\n" + bytes(2_000_000)
        connection.sendall(refused)
        first = b""
        while b"invalid_api_key" not in first:
            first += connection.recv(1 << 16)
        connection.sendall(b"GET /any HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer key\r\n\r\n")
        assert b'{"path":"/any"}' in first + connection.recv(1 << 16)


def test_a_whole_body_and_a_request_without_one_pass_as_they_are():
    async def run(headers, messages):
        sent = []

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        async def app(scope, receive, send):
            while messages:
                await receive()
            await JSONResponse({})(scope, receive, send)

        await Lingering(app)({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)
        return [message["type"] for message in sent]

    once = ["http.response.start", "http.response.body"]
    whole = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b", "more_body": False},
    ]
    assert asyncio.run(run([(b"content-length", b"2")], whole)) == once
    assert asyncio.run(run([], [])) == once
    assert asyncio.run(run([(b"content-length", b"2")], [{"type": "http.disconnect"}])) == once
