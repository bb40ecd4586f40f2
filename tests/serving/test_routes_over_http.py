"""Of all the routes vLLM has, those listed exist, and nothing else."""

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from f2l_vllm.serving.files import router
from f2l_vllm.serving.routes import VLLM_ROUTES, keep_listed_routes

OPEN = {"/health", "/ready", "/ping", "/version", "/metrics"}


@pytest.fixture(scope="module")
def vllm_routes():
    """Every route of vLLM's own server for a generating model, without plugins."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
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
    kept = own | VLLM_ROUTES | OPEN
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
    for path in VLLM_ROUTES:
        assert httpx.post(server.url + path, json={}).status_code == 400 or path == "/v1/messages", path


def test_an_operator_opens_more():
    app = FastAPI()
    for path in ("/tokenize", "/invocations", "/v1/chat/completions", "/docs2"):
        app.add_api_route(path, lambda: {}, methods=["GET"])
    keep_listed_routes(app, ["/tokenize"])
    assert {r.path for r in app.routes if isinstance(r, APIRoute)} == {"/tokenize", "/v1/chat/completions"}
    assert not [r for r in app.routes if r.path in ("/docs", "/openapi.json")]  # nor is the app's own documentation
