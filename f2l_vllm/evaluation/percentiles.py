"""Percentiles of a sample, as far as it carries them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def is_carried(percentile: float, count: int) -> bool:
    """Whether at least one of so many values is expected beyond it: 10 values for the 90th, 100 for the 99th.

    With fewer it is little else than the largest value, under a name that promises more.
    """
    return count * (100 - percentile) >= 100


def percentiles(values: Sequence[float] | np.ndarray, wanted: Sequence[int]) -> dict[str, float]:
    """`p90` and the like of the wanted percentiles; those that the sample does not carry are left out."""
    return {f"p{p}": float(np.percentile(values, p)) for p in wanted if is_carried(p, len(values))}
