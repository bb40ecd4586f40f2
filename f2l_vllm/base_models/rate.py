"""The share of a video's visual tokens that merging saves."""

from __future__ import annotations


def check_rate(rate: float) -> float:
    """Check and return a rate of merging visual tokens.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"a merging rate is the part of a video's visual tokens to save, from 0 (none) to less than 1; got {rate}"
        )
    return rate
