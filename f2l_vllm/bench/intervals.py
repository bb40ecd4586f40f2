"""95 % intervals [low, high] of what was measured; None where the sample carries none. The methods are scipy's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

Interval = list[float] | None

_LEVEL = 0.95
_FEWEST = 6  # values between whose extremes a median lies with this confidence
_RESAMPLES = 9999
_DIGITS = 4


def of_quantile(values: Sequence[float] | np.ndarray, percent: float = 50) -> Interval:
    """Of a percentile, by order statistics: no shape of the distribution is assumed."""
    if len(values) < 2:
        return None
    found = stats.quantile_test(values, p=percent / 100).confidence_interval(_LEVEL)
    return _whole(found.low, found.high)


def of_mean(values: Sequence[float] | np.ndarray) -> Interval:
    """Of a mean, by Student's t."""
    if len(values) < 2 or min(values) == max(values):
        return None
    found = stats.t.interval(_LEVEL, len(values) - 1, np.mean(values), stats.sem(values))
    return _whole(found[0], found[1])


def of_ratio(values: Sequence[float], others: Sequence[float], paired: bool = True) -> Interval:
    """Of the ratio of two medians, by a percentile bootstrap.

    Args:
        paired: values at the same place were measured in the same round.
    """
    if min(len(values), len(others)) < _FEWEST:
        return None
    found = stats.bootstrap(
        (np.asarray(values), np.asarray(others)),
        lambda some, rest, axis: np.median(some, axis=axis) / np.median(rest, axis=axis),
        paired=paired,
        vectorized=True,
        method="percentile",
        n_resamples=_RESAMPLES,
        confidence_level=_LEVEL,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return _whole(found.low, found.high)


def of_rounds(figures: Sequence[float]) -> Interval:
    """Of a figure that each round has once, as a rate or a ratio of paired rates: Student's t over the logarithms."""
    if len(figures) < 2 or min(figures) <= 0 or max(figures) == min(figures):
        return None
    found = stats.ttest_1samp(np.log(figures), 0.0).confidence_interval(_LEVEL)
    return _whole(math.exp(found.low), math.exp(found.high))


def of_each(
    rounds: Sequence[Mapping[str, float]], method: Callable[[Sequence[float]], Interval]
) -> dict[str, int | Interval]:
    """`n` rounds, and `…_ci95` of every figure that all of them have, except of counts (`total_…`)."""
    names = [name for name in rounds[0] if all(name in one for one in rounds)] if rounds else []
    names = [name for name in names if not name.startswith("total_")]
    return {"n": len(rounds), **{f"{name}_ci95": method([one[name] for one in rounds]) for name in names}}


def of_share(good: int, count: int) -> list[float]:
    """Of a share, by Wilson's method."""
    found = stats.binomtest(good, count).proportion_ci(confidence_level=_LEVEL, method="wilson")
    return [round(float(found.low), _DIGITS), round(float(found.high), _DIGITS)]


def _whole(low: float, high: float) -> Interval:
    return [round(float(low), _DIGITS), round(float(high), _DIGITS)] if math.isfinite(low + high) else None
