"""What fails behind the door is answered, and what no handler could read does not get there."""

import asyncio
import json
import time

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from f2l_vllm.server import vllm_errors
from f2l_vllm.server.errors import bad_request
from f2l_vllm.server.middleware.bodies import Bodies
from f2l_vllm.server.middleware.faults import Faults
from f2l_vllm.server.middleware.lingering import Lingering


class Harness:
    """An app of one route under both, called as a server calls it."""

    def __init__(self, route, check=None, idle_seconds=5.0):
        async def nothing(body, tenant):
            return None

        route.__module__ = "vllm.routes"  # as far as blame goes
        routes = [
            Route("/v1/chat/completions", route, methods=["POST"]),
            Route("/v1/messages", route, methods=["POST"]),
        ]
        bodies = {"max_body_bytes": 1 << 20, "max_images": 1, "has_tenants": False, "check": check or nothing}
        middleware = [Middleware(Faults, idle_seconds=idle_seconds), Middleware(Bodies, **bodies)]
        self.app = Starlette(routes=routes, middleware=middleware)

    async def post(self, *pieces, path="/v1/chat/completions", headers=(), leave_after=None):
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces[:-1]]
        messages.append({"type": "http.request", "body": pieces[-1], "more_body": leave_after == "never ends"})
        sent = []

        async def receive():
            if messages:
                return messages.pop(0)
            await asyncio.sleep(3600 if leave_after in (None, "never ends") else leave_after)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"", "state": {}}
        scope |= {
            "headers": [(b"content-type", b"application/json"), *headers],
            "http_version": "1.1",
            "scheme": "http",
        }
        await self.app(scope, receive, send)
        if not sent:
            return None, None
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


async def echo(request: Request):
    return JSONResponse(await request.json())


def post(harness, *pieces, **options):
    return asyncio.run(harness.post(*pieces, **options))


def test_a_body_reaches_the_route_as_it_came():
    assert post(Harness(echo), b'{"a": ', b"[1, 2]}") == (200, {"a": [1, 2]})


def test_what_a_handler_refused_is_answered_in_the_place_of_what_its_route_made_of_it():
    async def poorer(request: Request):
        request.state.refused = bad_request("video_not_ready", "Ask again.")
        return JSONResponse({"poorer": True}, 500)

    status, body = post(Harness(poorer), b"{}", path="/v1/messages")
    error = {"type": "invalid_request_error", "message": "Ask again.", "code": "video_not_ready"}
    assert (status, body) == (400, {"type": "error", "error": error})


def test_what_cannot_be_read_is_refused_in_the_envelope_of_the_api():
    status, body = post(Harness(echo), b'{"a": NaN}')
    assert (status, body["error"]["code"], body["error"]["type"]) == (400, "invalid_json", "invalid_request_error")
    status, body = post(Harness(echo), b'{"a": NaN}', path="/v1/messages")
    assert (status, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")


def test_what_fails_before_the_engine_is_asked_is_the_requests_fault():
    async def rendering(request: Request):
        raise {"odd": KeyError("function"), "type": AttributeError("'int' object has no attribute 'x'")}[
            (await request.json())["how"]
        ]

    for how in ("odd", "type"):
        status, body = post(Harness(rendering), json.dumps({"how": how}).encode())
        assert (status, body["error"]["code"]) == (400, "invalid_request")
        assert "object" not in body["error"]["message"]
        assert "function" not in body["error"]["message"]


def test_what_fails_after_that_is_the_servers_fault_and_says_nothing_of_python():
    async def generating(request: Request):
        vllm_errors.note_engine_asked()
        raise RuntimeError("/srv/secret.py is broken")

    status, body = post(Harness(generating), b"{}")
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "secret" not in json.dumps(body)


def test_a_body_that_stops_coming_is_given_up():
    started = time.monotonic()
    status, body = post(Harness(echo, idle_seconds=0.2), b"{", leave_after="never ends")
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert time.monotonic() - started < 10


def test_the_check_ends_with_the_client():
    ended = []

    async def slow(body, tenant):
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(tenant)

    assert post(Harness(echo, slow), b'{"structured_outputs": {"regex": "a"}}', leave_after=0.05) == (None, None)
    assert ended == ["default"]


def test_the_check_refuses():
    async def refuse(body, tenant):
        raise bad_request("structured_output_too_complex", f"{body}")

    status, body = post(Harness(echo, refuse), b'{"structured_outputs": {"regex": "a"}}')
    assert (status, body["error"]["code"]) == (400, "structured_output_too_complex")


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"GZIP"])
def test_an_encoded_body_is_refused(encoding):
    status, body = post(Harness(echo), b"{}", headers=[(b"content-encoding", encoding)])
    assert (status, body["error"]["code"]) == (415, "unsupported_content_encoding")


@pytest.mark.parametrize("behind", [lambda app: Faults(app, idle_seconds=5.0), Lingering])
def test_a_request_that_is_cancelled_as_a_piece_of_its_body_comes_is_cancelled(behind):
    async def scenario():
        pieces = asyncio.Queue()

        async def app(scope, receive, send):
            await JSONResponse({})(scope, receive, send)  # behind `Lingering`, this reads the rest
            while True:
                await receive()

        async def send(message):
            pass

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"9")]}
        request = asyncio.create_task(behind(app)(scope, pieces.get, send))
        await asyncio.sleep(0.01)
        pieces.put_nowait({"type": "http.request", "body": b"a", "more_body": True})
        await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait([request], timeout=0.5)
        assert request.cancelled()

    asyncio.run(scenario())
