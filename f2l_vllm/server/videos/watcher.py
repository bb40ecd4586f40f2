"""Waiting for videos: however many questions and readers of events wait, the catalog is asked once per tick for all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from http import HTTPStatus

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.states import IN_WORK, VideoState
from f2l_vllm.server.errors import APIError

logger = logging.getLogger(__name__)
_TICK_SECONDS = 0.03
_SHARE = 20  # a tick is followed by this many times the time it took, so that ticks take a small part of the time
_MOST_READERS = 1000
_EVENTS_A_SECOND = 200  # of all readers together
_FASTEST_SECONDS = 0.1

Progress = tuple[VideoState, float]


class Watcher:
    """Wakes questions when the file they wait for leaves the states of work, readers of events when it gets on, and all
    when the server stops.

    Args:
        catalog: asked where the files stand.
        is_stopping: whether the server shuts down.
        reader_share: part of the places for readers of events that one tenant may take.
    """

    def __init__(self, catalog: Catalog, is_stopping: Callable[[], bool], reader_share: float = 1.0) -> None:
        self._catalog = catalog
        self._is_stopping = is_stopping
        self._most_of_one = max(1, int(_MOST_READERS * reader_share))
        self._readers: Counter[str] = Counter()
        # By file: who waits, and the progress they have seen; None: they wait for the end only.
        self._waiting: dict[str, dict[asyncio.Future[Progress | None], Progress | None]] = defaultdict(dict)
        self._task: asyncio.Task[None] | None = None

    def add_reader(self, tenant: str) -> None:
        """Somebody begins to read events.

        Raises:
            APIError: `too_many_readers`.
        """
        if self._readers[tenant] >= self._most_of_one or self._readers.total() >= _MOST_READERS:
            message = "Too many streams of events are open: close some, or poll GET /v1/files/{id} every few seconds."
            raise APIError(HTTPStatus.TOO_MANY_REQUESTS, "too_many_readers", message, headers={"Retry-After": "10"})
        self._readers[tenant] += 1

    def remove_reader(self, tenant: str) -> None:
        """They have gone."""
        self._readers[tenant] -= 1
        if not self._readers[tenant]:
            del self._readers[tenant]

    @property
    def event_seconds(self) -> float:
        """How far apart the events of one reader are at the least: the more readers, the further."""
        return max(_FASTEST_SECONDS, self._readers.total() / _EVENTS_A_SECOND)

    async def wait(self, file_id: str, seconds: float, seen: Progress | None = None) -> Progress | None:
        """Return when the file is out of work (ready, failed or gone), when the server stops, or after `seconds`; with
        `seen` also when its state or progress differ from that, and then with those."""
        future: asyncio.Future[Progress | None] = asyncio.get_running_loop().create_future()
        self._waiting[file_id][future] = seen
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            return seen
        finally:
            del self._waiting[file_id][future]
            if not self._waiting[file_id]:
                del self._waiting[file_id]

    async def _watch(self) -> None:
        while self._waiting:
            started = time.monotonic()
            try:
                # Who begins to wait during the query is not in it, and is left for the next tick.
                asked = list(self._waiting)
                found = await asyncio.to_thread(self._catalog.progress, asked)
                for file_id in asked:
                    self._wake(file_id, found.get(file_id))
            except Exception:
                logger.exception("the catalog could not be asked; questions go on waiting")
            await asyncio.sleep(max(_TICK_SECONDS, _SHARE * (time.monotonic() - started)))

    def _wake(self, file_id: str, progress: Progress | None) -> None:
        has_ended = self._is_stopping() or progress is None or progress[0] not in IN_WORK
        for future, seen in self._waiting.get(file_id, {}).items():
            if not future.done() and (has_ended or seen not in (None, progress)):
                future.set_result(None if has_ended else progress)
