"""Percentiles of a sample, if the sample is large enough for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def is_carried(percentile: float, count: int) -> bool:
    """Whether one of `count` values or more is expected beyond the percentile: 10 for the 90th, 100 for the 99th.

    With fewer values the percentile is little else than the largest value, under a name that promises more.
    """
    return count * (100 - percentile) >= 100


def percentiles(values: Sequence[float] | np.ndarray, wanted: Sequence[int]) -> dict[str, float]:
    """`p90` and so on -> the wanted percentiles, except those for which the sample is too small."""
    return {f"p{p}": float(np.percentile(values, p)) for p in wanted if is_carried(p, len(values))}
