"""Of all the routes vLLM has, those listed exist, and nothing else."""

import time
from http.client import HTTPConnection

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from f2l_vllm.server.chat.request import QUESTION_ROUTES, STORED_ROUTES
from f2l_vllm.server.middleware.auth import keep_listed_routes
from f2l_vllm.server.videos.routes import router
from tests.support.vllm_names import make_arg_parser

OPEN = {"/health", "/ready", "/ping", "/version", "/metrics"}


@pytest.fixture(scope="module")
def vllm_routes():
    """Every route of vLLM's own server for a generating model, without plugins."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    return build_app(args, ("generate",)).routes


def requests_of(routes):
    for route in routes:
        path = getattr(route, "path", None)
        if path:
            for method in sorted(getattr(route, "methods", None) or {"GET"}):
                yield method, path.replace("{", "").replace("}", "").replace(":path", "")


def test_every_other_route_of_vllm_does_not_exist(server, vllm_routes):
    own = {route.path for route in router.routes}
    kept = own | QUESTION_ROUTES | STORED_ROUTES | OPEN
    closed = [r for r in vllm_routes if getattr(r, "path", "") not in kept]
    assert len(closed) > 10
    for method, path in requests_of(closed):
        if path in {"/v1/models"}:
            continue
        response = httpx.request(method, server.url + path, timeout=30)
        assert response.status_code in (404, 405), (method, path, response.text)


def test_the_listed_ones_are_there(server, vllm_routes):
    for path in OPEN:
        assert httpx.get(server.url + path, follow_redirects=True).status_code == 200, path
    for path in QUESTION_ROUTES:
        assert httpx.post(server.url + path, json={}).status_code == 400 or path.startswith("/v1/messages"), path


def test_an_operator_opens_more():
    app = FastAPI()
    for path in ("/tokenize", "/invocations", "/v1/chat/completions", "/docs2"):
        app.add_api_route(path, lambda: {}, methods=["GET"])
    keep_listed_routes(app, ["/tokenize"])
    assert {r.path for r in app.routes if isinstance(r, APIRoute)} == {"/tokenize", "/v1/chat/completions"}
    assert not [r for r in app.routes if r.path in ("/docs", "/openapi.json")]  # nor is the app's own documentation


def test_a_connection_is_still_open_when_clients_stop_using_theirs(server):
    """Clients on httpx use one for 5 s, after which vLLM's server alone would have closed it."""
    where = httpx.URL(server.url)
    connection = HTTPConnection(where.host, where.port, timeout=30)
    connection.request("GET", "/health")
    connection.getresponse().read()
    socket = connection.sock
    time.sleep(6)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    assert connection.sock is socket
