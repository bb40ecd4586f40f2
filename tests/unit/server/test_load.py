from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from f2l_vllm.server.middleware.load import Load


def test_every_response_says_how_much_the_engine_has_to_do():
    waiting = [1, 2, 3]
    client = TestClient(Load(PlainTextResponse("found", headers={"x-f2l-load": "forged"}), lambda: len(waiting)))
    assert client.get("/health").headers.get_list("x-f2l-load") == ["3"]
