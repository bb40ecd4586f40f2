"""Every request has an id, in the log and in the answer."""

import logging

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient

from f2l_vllm import logs
from f2l_vllm.server.middleware.request_ids import RequestIds


async def shown(scope, receive, send):
    """Answers with what the app behind sees: the header, and the id that lines of the log get, also later."""
    request = Request(scope)

    async def pieces():
        yield f"{request.headers.getlist('x-request-id')} {logs.request_id.get()}"

    headers = {"x-request-id": "vLLM's own"}
    await StreamingResponse(pieces(), headers=headers)(scope, receive, send)


def test_a_clients_id_is_kept():
    answer = TestClient(RequestIds(shown)).get("/", headers={"X-Request-Id": "mine-1"})
    assert answer.text == "['mine-1'] mine-1"
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert logs.request_id.get() is None


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, "caf\u00e9".encode("latin-1"), "tab\there"])
def test_a_request_without_a_usable_id_gets_a_new_one(given):
    client = TestClient(RequestIds(shown))
    headers = {} if given is None else {"X-Request-Id": given}
    first, second = (client.get("/", headers=headers) for _ in range(2))
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    name = first.headers["x-request-id"]
    assert len(name) == 32
    assert first.text == f"['{name}'] {name}"


def test_an_id_is_on_the_lines_about_its_request_alone(caplog):
    async def said(scope, receive, send):
        logging.getLogger("f2l_vllm.x").warning("asked")
        await PlainTextResponse("done")(scope, receive, send)

    records = []
    handler = logs.Handler("server")
    handler.emit = records.append
    logging.getLogger("f2l_vllm.x").addHandler(handler)
    try:
        client = TestClient(RequestIds(said))
        client.get("/", headers={"X-Request-Id": "one"})
        client.get("/", headers={"X-Request-Id": "two"})
        logging.getLogger("f2l_vllm.x").warning("nobody asked")
    finally:
        logging.getLogger("f2l_vllm.x").removeHandler(handler)
    assert [getattr(record, "request_id", None) for record in records] == ["one", "two", None]
