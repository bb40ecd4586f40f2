"""The share of a video's visual tokens that merging saves, and the share that dropping keeps."""

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


def check_keep_rate(keep: float) -> float:
    """Check and return the part of a video's visual tokens that is not dropped.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"a keep rate is the part of a video's visual tokens to keep, above 0 and up to 1; got {keep}")
    return keep
