"""What one request may ask of the engine."""

import pytest

from f2l_vllm.server.errors import APIError
from f2l_vllm.server.middleware import costs

WHAT_CLIENTS_SEND = {
    "model": "m",
    "messages": [{"role": "user", "content": "x"}] * 100,
    "n": 8,
    "logprobs": True,
    "top_logprobs": 20,
    "stop": ["\n", "###"],
    "logit_bias": {"5": -100},
    "tools": [{}] * 20,
}


@pytest.mark.parametrize(
    "body",
    [
        WHAT_CLIENTS_SEND,
        {"prompt": list(range(100_000))},
        {"prompt": ["x"] * 128},
        {"prompt": [[1, 2]] * 128},
        {"use_beam_search": True, "n": 8},
        {"stop": "."},
        {"n": None, "logprobs": None},
        {"logprobs": -1},
        [],
        "x",
        None,
    ],
)
def test_what_clients_send_is_let_through(body):
    costs.check(body)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("n", {"n": 16384}),
        ("n", {"n": "16384"}),
        ("n", {"n": 1e9}),
        ("n", {"n": 100, "prompt": ["x"] * 100}),
        ("n", {"prompt": ["x"] * 1024}),
        ("n", {"use_beam_search": True, "n": 64}),
        ("best_of", {"best_of": 1000}),
        ("logprobs", {"logprobs": 100_000}),
        ("prompt_logprobs", {"prompt_logprobs": 100_000}),
        ("stop", {"stop": ["x"] * 10_000}),
        ("stop", {"stop": "x" * 10_000}),
        ("bad_words", {"bad_words": ["x" * 10_000]}),
        ("stop_token_ids", {"stop_token_ids": [1] * 100_000}),
        ("allowed_token_ids", {"allowed_token_ids": [1] * 100_000}),
        ("logit_bias", {"logit_bias": {str(i): 1 for i in range(2000)}}),
        ("messages", {"messages": [{}] * 10_000}),
        ("input", {"input": [{}] * 10_000}),
        ("tools", {"tools": [{}] * 1000}),
        ("request_id", {"request_id": "x" * 10_000}),
        ("repetition_detection.max_pattern_size", {"repetition_detection": {"max_pattern_size": 10**6}}),
    ],
)
def test_what_all_others_would_pay_for_is_refused(field, body):
    with pytest.raises(APIError) as error:
        costs.check(body)
    assert (error.value.status, error.value.code, error.value.param) == (400, "request_too_costly", field)
