"""How many hypernetwork workers there should be: Ray Serve's controller asks at every tick.

Serve pickles this module by value. The catalog's URL is the setting `F2L_DATABASE_URL` of the controller's node.
"""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.settings import Settings

_KNOWN_SECONDS = 10.0  # for so long after a look its result counts


class QueuePolicy:
    """Enough workers for the videos that wait, and never fewer than are at work: a worker that is stopped finishes its
    video, but takes no other.

    The controller does nothing else while it asks, so a thread looks at the queue, and the last look counts.

    Args:
        videos_per_worker: waiting videos, including its own, for which there is another worker.
        seconds: between two looks at the queue.
    """

    def __init__(self, videos_per_worker: int = 2, seconds: float = 0.25) -> None:
        self._per_worker, self._seconds = videos_per_worker, seconds
        self._thread = ThreadPoolExecutor(1, "f2l-queue")
        self._catalog: Catalog | None = None
        self._look: Future[tuple[int, int]] | None = None
        self._known: tuple[int, int] | None = None  # jobs waiting, jobs running
        self._known_at = self._looked_at = -math.inf

    def __call__(self, context: Any) -> tuple[int, dict[str, int]]:
        """The number of replicas, and what it was computed from.

        Args:
            context: Serve's `AutoscalingContext`.
        """
        now = time.monotonic()
        if self._look is not None and self._look.done():
            try:
                self._known, self._known_at = self._look.result(), now
            except Exception as error:  # whatever a database and its driver make of being away
                logging.getLogger("ray.serve").warning("the queue of videos cannot be counted: %s", error)
            self._look = None
        if self._look is None and now - self._looked_at >= self._seconds:
            self._look, self._looked_at = self._thread.submit(self._count), now
        if self._known is None or now - self._known_at > _KNOWN_SECONDS:
            return context.target_num_replicas, {}
        waiting, running = self._known
        return max(running, -(-(waiting + running) // self._per_worker)), {"waiting": waiting, "running": running}

    def _count(self) -> tuple[int, int]:
        self._catalog = self._catalog or Catalog(Settings.read().catalog_url)
        return self._catalog.jobs()
