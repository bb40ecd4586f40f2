"""A contract with uvicorn (0.54): a body that has arrived is read, although its sender has hung up already."""

import asyncio
import socket
import threading
import time

import pytest
import uvicorn

from f2l_vllm.server.streams import hasty_senders
from f2l_vllm.server_process import free_port

BODY = b"x" * 30_000  # so little that uvicorn has all of it before the application asks


class Reader:
    """An application that reads a body late, when its sender has long gone."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        assert scope["type"] == "http"
        await asyncio.sleep(0.2)
        body, whole = b"", False
        while not whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body, whole = body + message["body"], not message["more_body"]
            await asyncio.sleep(0.05)
        self.bodies.append((whole, body))
        assert (await receive())["type"] == "http.disconnect"


@pytest.fixture(params=["h11", "httptools"])
def served(request):
    hasty_senders.install()
    reader, port = Reader(), free_port()
    server = uvicorn.Server(uvicorn.Config(reader, port=port, http=request.param, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield reader, port
    server.should_exit = True
    thread.join()


def put_and_leave(port, path, body=BODY, announced=None):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"PUT {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {announced or len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)


def read(reader):
    until = time.monotonic() + 60
    while not reader.bodies and time.monotonic() < until:
        time.sleep(0.02)
    return reader.bodies.pop()


def test_a_segment_is_read_whole_after_its_sender_has_gone(served):
    reader, port = served
    put_and_leave(port, "/v1/streams/stream-1/push/a.ts")
    assert read(reader) == (True, BODY)


def test_a_segment_that_was_cut_off_is_not_taken_for_whole(served):
    reader, port = served
    put_and_leave(port, "/v1/streams/stream-1/push/a.ts", announced=len(BODY) + 1)
    assert not read(reader)[0]


def test_elsewhere_a_client_that_has_gone_has_gone(served):
    reader, port = served
    put_and_leave(port, "/v1/files", body=b"x")
    assert read(reader) == (False, b"")
