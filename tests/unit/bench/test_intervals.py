"""Intervals hold what they should as often as they say, and there is none where the sample carries none."""

from __future__ import annotations

import numpy as np
import pytest

from f2l_vllm.bench import intervals
from f2l_vllm.bench.suites import amortise, latency, tax, throughput

RNG = np.random.default_rng(3)


def test_six_values_are_the_fewest_around_a_median() -> None:
    assert intervals.of_quantile([1, 2, 3, 4, 5]) is None
    assert intervals.of_quantile([4, 1, 6, 2, 5, 3]) == [1, 6]
    assert intervals.of_quantile([]) is None
    assert intervals.of_quantile(range(100), 99) is None
    assert intervals.of_ratio([1] * 5, [2] * 5) is None
    assert intervals.of_ratio([1, 2, 3, 4, 5, 6], [2, 4, 6, 8, 10, 12]) == [0.5, 0.5]


def test_one_round_or_none_that_differs_says_nothing_of_its_spread() -> None:
    for figures in ([], [3.0], [3.0, 3.0], [0.0, 1.0]):
        assert intervals.of_rounds(figures) is None
    low, high = intervals.of_rounds([9.0, 10.0, 11.0]) or (0, 0)
    assert 7 < low < 9.97 < high < 14


@pytest.mark.parametrize(
    "covers",
    [
        lambda: (intervals.of_quantile(RNG.exponential(size=40)), np.log(2)),
        lambda: (intervals.of_quantile(RNG.exponential(size=120), 90), np.log(10)),
        lambda: (intervals.of_rounds(RNG.lognormal(1, 0.2, size=4)), np.e),
    ],
)
def test_nineteen_of_twenty_hold_the_truth(covers) -> None:
    held = [low <= truth <= high for (low, high), truth in (covers() for _ in range(400))]
    assert 0.92 <= np.mean(held) <= 0.99


def test_pairs_tell_more_than_two_samples_apart() -> None:
    rounds = RNG.lognormal(0, 1, size=20)  # a machine that is slow for a while is slow for both
    ours, theirs = rounds * RNG.normal(1, 0.02, size=20), 2 * rounds * RNG.normal(1, 0.02, size=20)
    paired, apart = (intervals.of_ratio(ours, theirs, paired) for paired in (True, False))
    assert paired is not None
    assert apart is not None
    assert paired[0] < 0.5 < paired[1]
    assert paired[1] - paired[0] < (apart[1] - apart[0]) / 3


def test_rows_gain_what_their_samples_carry_and_no_more() -> None:
    cell = {"frames": 8, "resolution": 64, "prompt_tokens": 9, "state_bytes": 5}
    times = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    rows = [
        {**cell, "arm": "adapter", "ttft_ms": {"median": 3.5, "all": times}},
        {**cell, "arm": "frames", "ttft_ms": {"median": 7.0, "all": [2 * one for one in times]}},
        {**cell, "arm": "text", "ttft_ms": {"median": 2.0, "all": [1.0, 2.0, 3.0]}},
        {**cell, "arm": "frames", "frames": 9, "ttft_ms": None},
    ]
    found = latency.derive(rows)
    assert [(row["ttft_ms"] or {}).get("n") for row in found["rows"]] == [6, 6, 3, None]
    assert [(row["ttft_ms"] or {}).get("median_ci95") for row in found["rows"]] == [[1, 6], [2, 12], None, None]
    assert [ratio["ttft_ci95"] for ratio in found["ratios"]] == [[2, 2], None]
    assert latency.derive(found["rows"]) == found

    line = {"arm": "frames", "ttft_ms": [1.0] * 4, "first_ttft_ms": 1.0, "cumulative_ttft_ms": [1.0, 2.0, 3.0, 4.0]}
    line |= {"later_ttft_ms": {"median": 1.0}, "asked": 2}
    known = amortise.derive([{**line, "rounds": [[float(n), 1.0] for n in range(1, 7)]}, line])["rows"]
    assert known[0]["first_ttft_ci95_ms"] == [1, 6]
    assert known[0]["later_ttft_ms"]["n"] == 6
    assert known[0]["cumulative_ttft_ci95_ms"][3] == [4, 6 + 1 + 2 * 3.5]
    assert known[1] == line

    rate = {"videos": 2, "frames": 2, "popularity": "uniform", "concurrency": 1, "median_ttft_ms": 5.0}
    each = [{"request_throughput": 3.0 + n, "request_goodput": 3.0} for n in range(3)]
    fast = {**rate, "arm": "adapter", "request_throughput": 4.0, "rounds": each}
    slow = {**rate, "arm": "frames", "request_throughput": 2.0, "rounds": [{"request_throughput": 2.0}] * 3}
    found = throughput.derive([fast, slow])
    assert found["rows"][0]["request_throughput_ci95"] is not None
    assert "request_goodput_ci95" not in found["rows"][1]
    low, high = found["ratios"][0]["requests_ci95"]
    assert low < 2 < high
    assert found["ratios"][0]["ttft_ci95"] is None

    figures = {"output_throughput": 3.0, "median_tpot_ms": 2.0, "median_ttft_ms": 1.0}
    decode = {"traffic": "decode", "streams": 1, **figures}
    found = tax.derive([{**decode, "adapters": 0, "rounds": [figures] * 6}, {**decode, "adapters": 1}])
    assert found["rows"][0]["output_throughput_ci95"] == [3, 3]
    assert found["ratios"][0]["speed_ci95"] is None
