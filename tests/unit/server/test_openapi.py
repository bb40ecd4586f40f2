"""The OpenAPI description has vLLM's routes for questions, with what this server adds to them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.testclient import TestClient

from f2l_vllm.server import openapi, vllm_api
from f2l_vllm.server.app import F2LEndpointPlugin
from f2l_vllm.server.chat.content import REFUSED
from f2l_vllm.server.chat.request import MODES, QUESTION_ROUTES, STORED_ROUTES, options
from f2l_vllm.server.errors import APIError

ASKED = QUESTION_ROUTES - {"/v1/messages/count_tokens"}


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return openapi.reference()


def fields(described: dict[str, Any], path: str) -> dict[str, Any]:
    body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    found: dict[str, Any] = described["components"]["schemas"][body.rpartition("/")[2]]["properties"]
    return found


def test_vllms_routers_have_the_routes_for_questions() -> None:
    """A contract with vLLM 0.32 and 0.33."""
    found = {route.path for router in vllm_api.question_routers() for route in router.routes}  # type: ignore[attr-defined]
    assert found >= QUESTION_ROUTES | STORED_ROUTES


def test_every_route_is_described_and_no_other_of_vllms(described: dict[str, Any]) -> None:
    assert set(described["paths"]) >= {"/v1/files", "/v1/batches", *QUESTION_ROUTES, *STORED_ROUTES}
    assert "/v1/chat/completions/batch" not in described["paths"]
    assert set(openapi.DESCRIPTIONS) == QUESTION_ROUTES | STORED_ROUTES
    operations = [one for methods in described["paths"].values() for one in methods.values()]
    assert all(operation["description"] for operation in operations)


@pytest.mark.parametrize("path", sorted(ASKED))
def test_a_question_has_vllms_fields_and_ours_and_none_that_is_refused(described: dict[str, Any], path: str) -> None:
    assert {"model", "stream"} < set(fields(described, path))
    assert fields(described, path)["f2l"] == {"$ref": "#/components/schemas/F2LOptions"}
    assert not set(fields(described, path)) & set(REFUSED)
    operation = described["paths"][path]["post"]
    assert [one["name"] for one in operation["parameters"]] == ["X-F2L-Wait"]
    assert "F2LAnswer" in json.dumps(operation["responses"]["200"])


def test_parts_that_name_a_video_have_spans(described: dict[str, Any]) -> None:
    for name in ("FileFile", "VideoURL", "ResponseInputFileParam"):
        assert "F2LSpan" in str(described["components"]["schemas"][name]["properties"]["f2l"]), name


def test_it_refers_to_nothing_that_it_does_not_have(described: dict[str, Any]) -> None:
    text = json.dumps(described)
    named = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named - set(described["components"]["schemas"]) == set()
    assert "F2LVideo" in named


GIVEN: list[dict[str, Any]] = [
    *({"mode": mode} for mode in MODES),
    *({"wait": wait} for wait in ("none", None, 0, 3600, 2.5, -1, 3601)),
    {"mode": "guess"},
    {"speed": 1},
    {},
]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_the_description_takes_what_the_server_takes(given: dict[str, Any]) -> None:
    try:
        options({"f2l": given}, {}, 1.0)
        taken = True
    except APIError:
        taken = False
    try:
        openapi.F2LOptions.model_validate(given)
    except ValidationError:
        assert not taken
    else:
        assert taken


def test_a_server_gives_it_out_where_the_operator_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for listed, status in (("", 404), ("/openapi.json", 200)):
        monkeypatch.setenv("F2L_EXTRA_ROUTES", listed)
        app = FastAPI()
        for router in vllm_api.question_routers():
            app.include_router(router)
        F2LEndpointPlugin().attach_router(app)
        answer = TestClient(app).get("/openapi.json")
        assert answer.status_code == status
    assert "f2l" in fields(answer.json(), "/v1/chat/completions")
