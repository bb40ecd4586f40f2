"""Given enough values, no figure of any suite is shown or kept without their number and its interval."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from f2l_vllm.bench import metrics, report, run
from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.suites import amortise, ramp, tax, throughput
from f2l_vllm.client import Answer

RNG = np.random.default_rng(5)
ENOUGH = 400  # for a 99th percentile
MEASURED = re.compile(r".*(_ms|throughput|goodput|share)|median|p90")
NONE = re.compile(r"(std_|cumulative_).*|.*_itl_ms")  # spreads, lists named otherwise, values that depend on each other
Rows = list[dict[str, Any]]


def some(count: int) -> list[float]:
    return [round(float(value), 3) for value in RNG.lognormal(3, 0.3, size=count)]


def answers() -> list[Answer]:
    return [
        Answer(0.0, one / 1e3, one / 1e3 + 0.01 * rest, (), 9, 4)
        for one, rest in zip(some(ENOUGH), some(ENOUGH), strict=True)
    ]


def of_latency() -> Rows:
    cell = {"arm": "adapter", "frames": 8, "resolution": 64, "prompt_tokens": 9, "state_bytes": 5, "counted": False}
    times = some(40)
    return [{**cell, "ttft_ms": {"median": 20.0, "p90": 30.0, "all": times}}]


def of_amortise() -> Rows:
    suite = suites.load("amortise", {"arms": "adapter", "questions_per_video": 8})
    return [amortise._row(amortise.ARMS["adapter"], suite, [some(8) for _ in range(8)])]


def of_throughput() -> Rows:
    suite = suites.load("throughput", {})
    return [throughput._row(suite, "uniform", 4, "adapter", [(answers(), 9.0 + one) for one in range(3)])]


def of_tax() -> Rows:
    rounds = [dict.fromkeys(tax.figures(ENOUGH), value) for value in some(8)]
    return [{"traffic": "decode", "streams": 4, "adapters": 1, **tax._medians(rounds)}]


def of_ramp() -> Rows:
    return [ramp.row(8.0, ENOUGH, ENOUGH - 2, answers(), 50.0, [], 0.99)]


ROWS: dict[str, Callable[[], Rows]] = {
    "latency": of_latency,
    "amortise": of_amortise,
    "throughput": of_throughput,
    "tax": of_tax,
    "ramp": of_ramp,
}


def measured(name: str) -> Rows:
    rows = ROWS[name]()
    found: Rows = (rows and run.SUITES[name].derive(rows)).get("rows", rows)
    return found


def test_every_suite_that_measures_is_here() -> None:
    assert {*ROWS, "capacity"} == {*suites.names()}


@pytest.mark.parametrize("name", ROWS)
def test_a_table_shows_n_and_the_interval_of_every_figure(name: str) -> None:
    header, cells = report._GRIDS[name](measured(name))
    figures = [(column, cell) for column, cell in zip(header, cells[0], strict=True) if re.search(r"\d\.\d", cell)]
    assert len(figures) >= 2
    assert [column for column, cell in figures if "[" not in cell] == []
    assert "–" not in cells[0]
    assert int(cells[0][header.index("n")].replace(",", "")) > 1


@pytest.mark.parametrize("name", ROWS)
def test_a_result_keeps_n_and_the_interval_of_every_figure(name: str) -> None:
    (row,) = measured(name)
    parts = [one for one in (row, *row.values()) if isinstance(one, dict) and "n" in one]
    assert parts
    once = {"request_throughput", "output_throughput"} if name == "ramp" else set()  # a rate is asked at once
    for part in parts:
        figures = [key for key, value in part.items() if MEASURED.fullmatch(key) and not isinstance(value, dict)]
        figures = [key for key in figures if not NONE.fullmatch(key) and "ci95" not in key and key not in once]
        assert figures
        beside = {key: part.get(f"{key}_ci95") or part.get(f"{key.removesuffix('_ms')}_ci95_ms") for key in figures}
        assert [key for key, interval in beside.items() if not interval] == []


def test_a_mean_has_the_interval_of_student() -> None:
    found = metrics.summary(answers(), 9.0)
    low, high = found["mean_ttft_ci95_ms"]
    half = 1.96 * found["std_ttft_ms"] / ENOUGH**0.5
    assert low == pytest.approx(found["mean_ttft_ms"] - half, rel=1e-2)
    assert high == pytest.approx(found["mean_ttft_ms"] + half, rel=1e-2)
