"""Keys name tenants; a request without one goes no further than the routes that are open."""

import hashlib
import json
import os

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from f2l_vllm.server.middleware.auth import AuthMiddleware
from f2l_vllm.server.tenants import DEFAULT_TENANT, Keys, tenant_of


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def bearer(key):
    return f"Bearer {key}"


def test_without_keys_everyone_is_the_default_tenant():
    keys = Keys([], None)
    assert keys.is_open
    assert keys.tenant(None) == keys.tenant(bearer("anything")) == DEFAULT_TENANT


def test_the_servers_own_keys_are_one_tenant():
    keys = Keys(["one", "two"], None)
    assert not keys.is_open
    assert keys.tenant(bearer("one")) == keys.tenant("bearer two") == DEFAULT_TENANT
    for wrong in (None, "", "one", "Basic one", bearer("on"), bearer("one "), bearer(""), bearer("\udcff")):
        assert keys.tenant(wrong) is None


@pytest.mark.parametrize("name", ["tenants.json", "tenants.toml"])
def test_a_file_names_tenants_and_their_keys(tmp_path, name):
    hashed = "sha256:" + hashlib.sha256(b"b1").hexdigest()
    text = f'a = ["a1", "a2"]\nb = ["{hashed}"]\n' if name.endswith("toml") else {"a": ["a1", "a2"], "b": [hashed]}
    keys = Keys([], written(tmp_path / name, text))
    assert [keys.tenant(bearer(key)) for key in ("a1", "a2", "b1")] == ["a", "a", "b"]
    assert keys.tenant(bearer(hashed)) is None  # who reads the file does not know the key
    assert keys.tenant(None) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ({}, "must hold an object"),
        ([], "must hold an object"),
        ({"a": "key"}, "list of keys"),
        ({"a": [""]}, "not empty"),
        ({"a": ["x"], "b": ["x"]}, "share a key"),
        ({"a": ["sha256:12"]}, "64 digits"),
        ({"": ["x"]}, "1 to 128"),
    ],
)
def test_a_file_that_cannot_work_stops_the_start(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        Keys([], written(tmp_path / "tenants.json", content))


def test_one_kind_of_key_at_a_time_and_the_file_must_exist(tmp_path):
    with pytest.raises(ValueError, match="either --api-key"):
        Keys(["key"], written(tmp_path / "tenants.json", {"a": ["x"]}))
    with pytest.raises(ValueError, match="cannot be read"):
        Keys([], tmp_path / "nothing.json")


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(tmp_path):
    path = written(tmp_path / "tenants.json", {"a": ["old"]})
    keys = Keys([], path)
    replacement = written(tmp_path / "new", {"a": ["new"], "b": ["bee"]})
    os.replace(replacement, path)
    assert [keys.tenant(bearer(key)) for key in ("old", "new", "bee")] == [None, "a", "b"]
    os.replace(written(tmp_path / "new", "{ half"), path)
    assert keys.tenant(bearer("new")) == "a"
    path.unlink()
    assert keys.tenant(bearer("bee")) == "b"
    assert keys.tenant(None) is None
    written(path, {"a": ["third key"]})
    assert [keys.tenant(bearer(key)) for key in ("new", "third key")] == [None, "a"]


@pytest.fixture
def door(tmp_path):
    async def who(request: Request) -> JSONResponse:
        return JSONResponse({"tenant": tenant_of(request), "bytes": len(await request.body())})

    routes = [Route(path, who, methods=["GET", "POST"]) for path in ("/v1/files", "/v1/models", "/health", "/healthy")]
    keys = Keys([], written(tmp_path / "tenants.json", {"a": ["a1"], "b": ["b1"]}))
    return TestClient(AuthMiddleware(Starlette(routes=routes), keys, ["/health"]), raise_server_exceptions=False)


def test_a_request_carries_its_tenant(door):
    for key in ("a1", "b1"):
        assert door.get("/v1/models", headers={"Authorization": bearer(key)}).json()["tenant"] == key[0]


@pytest.mark.parametrize("path", ["/v1/files", "/v1/models", "/healthy", "/health/x", "//health", "/nothing", "/"])
def test_without_a_key_nothing_but_an_error_of_openais_shape(door, path):
    for headers in ({}, {"Authorization": bearer("wrong")}, {"Authorization": "a1"}):
        found = door.post(path, headers=headers)
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
        assert found.headers["WWW-Authenticate"] == "Bearer"


def test_a_key_may_come_as_anthropics_clients_send_it(door):
    assert door.get("/v1/models", headers={"X-Api-Key": "b1"}).json()["tenant"] == "b"
    assert door.get("/v1/models", headers={"X-Api-Key": "wrong"}).status_code == 401
    both = {"X-Api-Key": "b1", "Authorization": bearer("a1")}
    assert door.get("/v1/models", headers=both).json()["tenant"] == "a"


def test_vllms_own_check_finds_a_key_where_it_looks_for_it():
    async def seen(request: Request) -> JSONResponse:
        return JSONResponse(request.headers["authorization"])

    app = Starlette(routes=[Route("/v1/messages", seen)])
    door = TestClient(AuthMiddleware(app, Keys(["one"], None), []))
    assert door.get("/v1/messages", headers={"X-Api-Key": "one"}).json() == bearer("one")


def test_open_routes_need_no_key(door):
    assert door.get("/health").json()["tenant"] == DEFAULT_TENANT
    assert door.get("/health", headers={"Authorization": bearer("a1")}).json()["tenant"] == "a"
