"""After how many questions a way with a higher start cost has cost no more than another."""

from __future__ import annotations

import math


def questions(first: float, later: float, other_first: float, other_later: float) -> int | None:
    """The least number of questions, or None if there is none.

    Args:
        first, later: the cost of the first question about a video, and of each later one.
        other_first, other_later: the same for the other way, in the same unit.
    """
    if first <= other_first:
        return 1
    if later >= other_later:
        return None
    return 1 + math.ceil(round((first - other_first) / (other_later - later), 9))
