"""Every body is read, counted and admitted before any route sees it."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from f2l_vllm.server.middleware.bodies import Bodies
from f2l_vllm.server.middleware.faults import Faults
from f2l_vllm.server.tenants import asking_tenant

PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "logo"}


async def echo(request: Request) -> JSONResponse:
    body = await request.body()
    return JSONResponse({"bytes": len(body), "body": body.decode(errors="replace"), "tenant": asking_tenant.get()})


async def nothing(body, tenant):
    return None


def bodies(**options):
    routes = [
        Route(path, echo, methods=["GET", "POST", "PUT"])
        for path in ("/v1/files", "/v1/files/{id}", "/v1/responses", "/any")
    ]
    limits = {"max_body_bytes": 100, "max_images": 2, "has_tenants": True, "check": nothing, **options}
    return Faults(Bodies(Starlette(routes=routes), **limits), idle_seconds=5.0)


@pytest.fixture
def client():
    return TestClient(bodies(), raise_server_exceptions=False, headers={"Content-Type": "text/plain"})


def test_a_body_may_not_exceed_the_cap_whatever_it_claims(client):
    assert client.post("/any", content=b"x" * 100).json()["bytes"] == 100
    found = client.post("/any", content=b"x" * 101)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "request_too_large")
    assert client.post("/any", content=iter([b"x" * 60, b"x" * 60])).status_code == 413
    assert client.post("/v1/files", content=b"x" * 101).json()["bytes"] == 101  # caps itself


def test_a_body_where_none_belongs_is_read_to_its_end_and_dropped(client):
    assert client.request("GET", "/any", content=b"x" * 100).json()["bytes"] == 0
    assert client.request("GET", "/any", content=iter([b"x" * 60])).json()["bytes"] == 0
    assert client.request("GET", "/any", content=b"x" * 101).status_code == 413
    taken = []

    async def receive():
        taken.append(1)
        return {"type": "http.request", "body": b"x" * 20, "more_body": len(taken) < 3}

    async def send(message):
        assert len(taken) == 3  # who is still sending when an answer comes may not hear it

    scope = {"type": "http", "method": "HEAD", "path": "/any", "headers": [(b"content-length", b"60")], "state": {}}
    asyncio.run(bodies()({**scope, "query_string": b"", "root_path": ""}, receive, send))


def test_a_body_is_checked_whatever_it_calls_itself():
    body = {"messages": [{"role": "user", "content": [{"image_pil": "x"}]}]}
    client = TestClient(bodies(max_body_bytes=1000))
    for method, kind in (("POST", "application/json"), ("POST", "text/plain"), ("PUT", "")):
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):  # all that a route's own parser reads
            content = json.dumps(body).encode(encoding)
            found = client.request(method, "/any", content=content, headers={"Content-Type": kind})
            codes = {"unsupported_part"} if kind == "text/plain" or encoding == "utf-8" else {"invalid_json"}
            assert (found.status_code, {found.json()["error"]["code"]}) == (400, codes)


def test_what_was_changed_is_what_goes_on(client):
    client = TestClient(bodies(max_body_bytes=1000))
    found = client.post("/any", json={"messages": [{"role": "user", "content": [PICTURE]}], "user": "é"})
    uuid = json.loads(found.json()["body"])["messages"][0]["content"][0]["uuid"]
    assert len(uuid) == 64


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1,2", b'"text"', b"3"])
def test_what_is_no_request_is_the_routes_to_refuse(client, content):
    found = client.post("/any", content=content, headers={"Content-Type": "text/plain"})
    assert found.json()["bytes"] == len(content)


def test_nesting_without_end_is_refused():
    client = TestClient(bodies(max_body_bytes=1 << 20))
    found = client.post("/any", content=b"[" * 200_000)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "request_too_complex")


def test_the_room_for_bodies_is_shared_and_given_back():
    async def run():
        released = asyncio.Event()

        async def slow(scope, receive, send):
            await receive()
            await released.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        bodies = Bodies(slow, max_body_bytes=100, max_images=2, has_tenants=True, check=nothing)
        app = Faults(bodies, idle_seconds=5.0)

        async def post(tenant):
            sent = []
            headers = [(b"content-type", b"text/plain")]
            scope = {"type": "http", "method": "POST", "path": "/any", "headers": headers, "state": {"tenant": tenant}}
            scope |= {"query_string": b""}

            async def receive():
                return {"type": "http.request", "body": b"x" * 100}

            async def send(message):
                sent.append(message)

            await app(scope, receive, send)
            return sent[0]["status"]

        waiting = [asyncio.create_task(post("a")) for _ in range(2)]
        await asyncio.sleep(0)
        assert await post("a") == 503  # a tenant has half of the room
        waiting += [asyncio.create_task(post(tenant)) for tenant in "bc"]
        await asyncio.sleep(0)
        assert await post("d") == 503
        released.set()
        assert await asyncio.gather(*waiting) == [200] * 4
        assert await post("a") == 200
        assert not bodies._held

    asyncio.run(run())


def test_a_null_of_a_response_is_its_default():
    client = TestClient(bodies(max_body_bytes=1000))
    for path, kept in (("/v1/responses", {"input": "x"}), ("/any", {"input": "x", "background": None})):
        found = client.post(path, json={"input": "x", "background": None})
        assert json.loads(found.json()["body"]) == kept


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=", "text/plain", ""])
def test_json_of_whatever_type_holds_no_half_characters(kind):
    seen = []

    async def check(constraint, _tenant):
        seen.append(constraint.text.encode())

    client = TestClient(bodies(check=check, max_body_bytes=1000), raise_server_exceptions=False)
    body = json.dumps({"messages": [], "structured_outputs": {"grammar": "\ud800"}})
    found = client.post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
    assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_json")
    assert seen == []
