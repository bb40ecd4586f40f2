"""How many engines there should be. Ray Serve's controller asks, and applies its config's bounds and delays."""

from __future__ import annotations

import math
from typing import Any


class LoadPolicy:
    """As many engines as keep each at `target` questions, running and waiting.

    Questions do not pass through Serve, so its own count of them is always 0; the engines say theirs.
    """

    def __init__(self, target: float = 24.0) -> None:
        if not target > 0:
            raise ValueError(f"target is {target}: give the number of questions that an engine should have")
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, float]]:
        """The number of replicas, for Serve's `AutoscalingContext`."""
        loads = (context.aggregated_metrics or {}).get("load", {})
        if not loads:
            return context.target_num_replicas, {}  # nobody has said anything yet
        return max(1, math.ceil(sum(loads.values()) / self._target)), {}
