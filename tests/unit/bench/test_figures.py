"""Figures carry the names of `vllm bench serve` and are those it computes."""

from __future__ import annotations

import random

import pytest

from f2l_vllm.bench import metrics
from f2l_vllm.client import Answer


def answer(ttft: float, gaps: list[float], tokens: int, prompt: int = 10) -> Answer:
    return Answer(0.0, ttft, ttft + sum(gaps), tuple(gaps), prompt, tokens)


def test_figures_of_known_answers() -> None:
    answers = [answer(0.1, [0.02] * 4, 5), answer(0.3, [0.04] * 4, 5), answer(0.2, [], 1)]
    found = metrics.summary(answers, 2.0)
    assert found["completed"] == 3
    assert found["request_throughput"] == 1.5
    assert found["output_throughput"] == 5.5
    assert found["total_input_tokens"] == 30
    assert found["median_ttft_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx(30)  # an answer of one token has none
    assert found["median_itl_ms"] == pytest.approx(30)
    assert found["median_e2el_ms"] == pytest.approx(200)
    assert "request_goodput" not in found
    assert found["median_ttft_ci95_ms"] is None  # three answers carry none
    assert metrics.summary([answer(0.1 * n, [], 1) for n in range(1, 7)], 2.0)["median_ttft_ci95_ms"] == [100, 600]


def test_percentiles_that_so_few_answers_do_not_carry_are_left_out() -> None:
    def names(count: int) -> set[str]:
        found = metrics.summary([answer(0.1 * n, [], 1) for n in range(count)], 2.0)
        return {name for name in found if name.startswith("p") and "ttft_ms" in name}

    assert names(1) == set()
    assert names(9) == {"p50_ttft_ms"}
    assert names(10) == {"p50_ttft_ms", "p90_ttft_ms"}
    assert names(99) == {"p50_ttft_ms", "p90_ttft_ms", "p95_ttft_ms"}
    assert metrics.summary([answer(0.1, [], 1)] * 100, 2.0)["p99_ttft_ms"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("slo", "good"),
    [({"ttft": 250}, 2), ({"ttft": 250, "tpot": 15}, 1), ({"e2el": 100}, 0), ({"tpot": 45}, 3)],
)
def test_goodput_counts_answers_that_keep_every_limit(slo: dict[str, float], good: int) -> None:
    answers = [answer(0.1, [0.02] * 4, 5), answer(0.3, [0.04] * 4, 5), answer(0.2, [], 1)]
    assert metrics.summary(answers, 2.0, slo)["request_goodput"] == good / 2


def test_no_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="no answers"):
        metrics.summary([], 1.0)


def test_the_figures_are_those_of_vllm_0_32() -> None:
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    rng = random.Random(0)
    answers = [
        answer(rng.uniform(0.01, 2), [rng.uniform(0.001, 0.2) for _ in range(length - 1)], length, rng.randint(5, 90))
        for length in (rng.randint(1, 40) for _ in range(50))
    ]
    outputs = [
        RequestFuncOutput(
            success=True,
            ttft=one.ttft,
            latency=one.latency,
            itl=list(one.itl),
            output_tokens=one.output_tokens,
            prompt_len=one.prompt_tokens,
        )
        for one in answers
    ]
    requests = [SampleRequest(prompt="", prompt_len=o.prompt_len, expected_output_len=1) for o in outputs]
    slo = {"ttft": 1000.0, "tpot": 100.0, "e2el": 3000.0}
    theirs, _ = calculate_metrics(requests, outputs, 7.0, None, [50.0, 90.0, 95.0, 99.0], slo)
    ours = metrics.summary(answers, 7.0, slo)
    for name in ("completed", "request_throughput", "output_throughput", "request_goodput"):
        assert ours[name] == pytest.approx(getattr(theirs, name)), name
    assert ours["total_input_tokens"] == theirs.total_input
    assert ours["total_output_tokens"] == theirs.total_output
    for of in ("ttft", "tpot", "itl", "e2el"):
        for figure in ("mean", "median", "std"):
            assert ours[f"{figure}_{of}_ms"] == pytest.approx(getattr(theirs, f"{figure}_{of}_ms")), (figure, of)
        for percent, value in getattr(theirs, f"percentiles_{of}_ms"):
            if percent < 99 or of == "itl":  # fifty answers carry no 99th percentile, their many gaps do
                assert ours[f"p{percent:g}_{of}_ms"] == pytest.approx(value), (percent, of)
