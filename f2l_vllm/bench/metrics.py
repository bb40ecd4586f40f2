"""Figures of many answers, with the names and formulas of `vllm bench serve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from f2l_vllm.bench import intervals
from f2l_vllm.client import Answer
from f2l_vllm.evaluation.percentiles import is_carried, percentiles

PERCENTILES = (50, 90, 95, 99)


def summary(answers: Sequence[Answer], seconds: float, slo: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Throughput, goodput, percentiles with their intervals, except percentiles for which there are too few answers.

    To vLLM's keys come `mean_ttft_ci95_ms`, `median_ttft_ci95_ms` and so on: [low, high], or None where the answers
    carry no interval.

    Args:
        seconds: from the first question to the last answer.
        slo: limits of a good answer for `ttft`, `tpot` and `e2el`, milliseconds; None or empty: no goodput.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("there are no answers to sum up")
    figures: dict[str, Any] = {
        "duration": seconds,
        "completed": len(answers),
        "total_input_tokens": sum(answer.prompt_tokens for answer in answers),
        "total_output_tokens": sum(answer.output_tokens for answer in answers),
        "request_throughput": len(answers) / seconds,
        "output_throughput": sum(answer.output_tokens for answer in answers) / seconds,
    }
    if slo:
        good = sum(is_good(answer, slo) for answer in answers)
        figures["request_goodput"] = good / seconds
    values = {
        "ttft": [answer.ttft for answer in answers],
        "tpot": [answer.tpot for answer in answers if answer.output_tokens > 1],
        "itl": [gap for answer in answers for gap in answer.itl],
        "e2el": [answer.latency for answer in answers],
    }
    for name, some in values.items():
        figures |= _spread(name, np.array(some or [0.0]) * 1e3)
        if name != "itl":  # the gaps within an answer depend on each other
            figures |= _intervals(name, np.array(some) * 1e3)
    return figures


def rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as they are kept."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}


def is_good(answer: Answer, slo: Mapping[str, float]) -> bool:
    """Whether an answer is within its limits, milliseconds."""
    return all(_value(answer, name) * 1e3 <= most for name, most in slo.items())


def _spread(name: str, milliseconds: np.ndarray) -> dict[str, float]:
    figures = {
        f"mean_{name}_ms": float(milliseconds.mean()),
        f"median_{name}_ms": float(np.median(milliseconds)),
        f"std_{name}_ms": float(milliseconds.std()),
    }
    return figures | {f"{p}_{name}_ms": value for p, value in percentiles(milliseconds, PERCENTILES).items()}


def _intervals(name: str, milliseconds: np.ndarray) -> dict[str, intervals.Interval]:
    carried = {f"p{p}": p for p in PERCENTILES[1:] if is_carried(p, len(milliseconds))}
    return {f"mean_{name}_ci95_ms": intervals.of_mean(milliseconds)} | {
        f"{figure}_{name}_ci95_ms": intervals.of_quantile(milliseconds, p)
        for figure, p in ({"median": 50, "p50": 50} | carried).items()
    }


def _value(answer: Answer, name: str) -> float:
    return {"ttft": answer.ttft, "tpot": answer.tpot, "e2el": answer.latency}[name]
