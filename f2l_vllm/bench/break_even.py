"""From how many questions on a way that starts dearer has cost no more than another."""

from __future__ import annotations

import math


def questions(first: float, later: float, other_first: float, other_later: float) -> int | None:
    """The least number of questions, or None where there is none.

    Args:
        first, later: what the first question about a video, and each later one, cost.
        other_first, other_later: the same of the other way, in the same unit.
    """
    if first <= other_first:
        return 1
    if later >= other_later:
        return None
    return 1 + math.ceil(round((first - other_first) / (other_later - later), 9))
