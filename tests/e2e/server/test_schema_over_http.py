"""This server's own routes under requests made from their schema: no server error, and errors in OpenAI's shape."""

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, settings

from f2l_vllm.server.batches.routes import router

QUESTION = [{"role": "user", "content": "What is shown?"}]
app = FastAPI()
app.include_router(router)
schema = schemathesis.openapi.from_dict(app.openapi())


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_lost(server, clips):
    file = server.upload(clips[0])
    yield
    assert server.client.files.retrieve(file.id).status == "processed"
    ask = server.client.chat.completions.create(model=file.id, messages=QUESTION, max_tokens=4)
    assert ask.choices[0].finish_reason


@schema.include(path_regex="^/v1/(files|models|uploads|batches)").parametrize()
@settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
def test_any_request_of_the_schema(server, case):
    response = case.call(base_url=server.url, timeout=120)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert {"message", "type", "param", "code"} <= set(error)
