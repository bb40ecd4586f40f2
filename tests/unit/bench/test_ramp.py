"""The rates that a ramp tries, and what it says of each."""

from __future__ import annotations

import pytest

from f2l_vllm.bench import report
from f2l_vllm.bench.suites import ramp
from f2l_vllm.client import Answer


def tried(limit: float, first: float, precision: float = 0.1, lowest: float = 1e-9) -> list[dict]:
    """What is tried at a server whose answers are good up to `limit` questions a second."""
    rows: list[dict] = []
    while (rate := ramp.next_rate(rows, first, precision, lowest)) is not None:
        rows.append({"rate": rate, "is_good": rate <= limit})
    return rows


@pytest.mark.parametrize("limit", [0.3, 1.0, 37.0, 900.0])
@pytest.mark.parametrize("first", [0.5, 8.0, 5000.0])
def test_the_highest_good_rate_is_found_from_wherever_it_begins(limit: float, first: float) -> None:
    rows = tried(limit, first)
    found = ramp.derive(rows)["highest"]["rate"]
    assert found <= limit <= 1.1 * found
    assert len(rows) < 24


def test_a_finer_answer_takes_more_rates() -> None:
    assert len(tried(37, 1, 0.01)) > len(tried(37, 1, 0.5))


def test_a_ramp_ends_where_nothing_is_ever_good_or_bad() -> None:
    never, always = tried(0, 1), tried(float("inf"), 1)
    assert len(never) == len(always) == 24
    assert ramp.derive(never) == {"highest": None}
    assert [row["rate"] for row in tried(0, 1, lowest=0.2)] == [1, 0.5, 0.25]
    assert ramp.derive(always)["highest"]["rate"] == 2**23


def test_a_rate_above_a_bad_one_does_not_count() -> None:
    rows = [{"rate": rate, "is_good": rate != 4} for rate in (1, 2, 4, 8)]
    assert ramp.derive(rows)["highest"]["rate"] == 2


def test_a_row_has_its_number_and_intervals() -> None:
    answers = [Answer(0.0, ttft, ttft + 1, (), 9, 2) for ttft in (0.1, 0.2, 0.3, 0.4) * 24 + (0.5, 0.6)]
    row = ramp.row(8.0, 100, 97, answers, 10.0, ["queue_full", "APITimeoutError"], 0.99)
    assert (row["n"], row["share"], row["is_good"]) == (100, 0.97, False)
    assert row["share_ci95"] == [0.9155, 0.9897]  # Wilson's, as tables have it
    assert row["failures"] == {"APITimeoutError": 1, "queue_full": 1}
    low, high = row["median_ttft_ci95_ms"]
    assert low <= row["median_ttft_ms"] <= high
    assert ramp.row(8.0, 100, 99, answers, 10.0, [], 0.99)["is_good"]
    assert not ramp.row(8.0, 100, 100, answers, 30.0, [], 0.99)["is_good"]  # it took much longer than asking
    silent = ramp.row(8.0, 3, 0, [], 1.0, ["engine_lost"] * 3, 0.99)
    result = {"suite": "ramp", "rows": [row, silent], "highest": None}
    result["configuration"] = {"share": 0.99, "slo": {"ttft": 500.0, "tpot": None}}
    header, cells = report.grid(result)
    assert {len(line) for line in cells} == {len(header)}
    assert report.sentences(result) == ["At no rate were 99% of the answers good (ttft 500 ms)."]
    assert "Up to 8 questions a second" in report.sentences(result | {"highest": row})[0]
