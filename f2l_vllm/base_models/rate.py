"""How many of a video's visual tokens merging saves."""

from __future__ import annotations


def check_rate(rate: float) -> float:
    """A rate of merging visual tokens: the rate itself.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"a merging rate is the part of a video's visual tokens to save, from 0 (none) to less than 1; got {rate}"
        )
    return rate
