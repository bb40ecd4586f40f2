"""Waiting for videos: one catalog query serves all waiting questions and readers of events.

It is asked many times a second for readers of events, and where no notices arrive. Questions alone wait for a notice
that some file's work has ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from http import HTTPStatus

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.listener import Listener
from f2l_vllm.catalog.notices import FILES
from f2l_vllm.catalog.states import IN_WORK, VideoState
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.videos.bell import Bell

logger = logging.getLogger(__name__)
_TICK_SECONDS = 0.03
_REST_SECONDS = 1.0  # between two ticks while notices arrive; one may get lost
_STOP_SECONDS = 0.1  # how long a stop of the server may go unnoticed
_SHARE = 20  # the pause after a tick is this many times the tick's duration, so that ticks take little of the time
_MOST_READERS = 1000
_EVENTS_A_SECOND = 200  # of all readers together
_FASTEST_SECONDS = 0.1

Progress = tuple[VideoState, float]


class Watcher:
    """Wakes questions when the file they wait for is no longer in work, readers of events when the file makes progress,
    and everybody when the server stops.

    Args:
        catalog: tells the state of the files.
        is_stopping: whether the server is shutting down.
        reader_share: the share of the places for readers of events that one tenant may take.
        listener: hears of files whose work has ended.
    """

    def __init__(
        self,
        catalog: Catalog,
        is_stopping: Callable[[], bool],
        reader_share: float = 1.0,
        listener: Listener | None = None,
    ) -> None:
        self._catalog = catalog
        self._is_stopping = is_stopping
        self._bell = Bell(listener, FILES)
        self._most_of_one = max(1, int(_MOST_READERS * reader_share))
        self._readers: Counter[str] = Counter()
        # By file: who waits, and the progress they have seen; None if they wait only for the end.
        self._waiting: dict[str, dict[asyncio.Future[Progress | None], Progress | None]] = defaultdict(dict)
        self._task: asyncio.Task[None] | None = None

    def add_reader(self, tenant: str) -> None:
        """Count a reader of events, before it begins.

        Raises:
            APIError: `too_many_readers`.
        """
        if self._readers[tenant] >= self._most_of_one or self._readers.total() >= _MOST_READERS:
            message = "Too many streams of events are open: close some, or poll GET /v1/files/{id} every few seconds."
            raise APIError(HTTPStatus.TOO_MANY_REQUESTS, "too_many_readers", message, headers={"Retry-After": "10"})
        self._readers[tenant] += 1

    def remove_reader(self, tenant: str) -> None:
        """Uncount a reader that has gone."""
        self._readers[tenant] -= 1
        if not self._readers[tenant]:
            del self._readers[tenant]

    @property
    def event_seconds(self) -> float:
        """The least number of seconds between two events of one reader; it grows with the number of readers."""
        return max(_FASTEST_SECONDS, self._readers.total() / _EVENTS_A_SECOND)

    async def wait(self, file_id: str, seconds: float, seen: Progress | None = None) -> Progress | None:
        """Return when the file is no longer in work (ready, failed or gone), when the server stops, or after `seconds`.
        With `seen`, also return when state or progress differ from it, and return the new values."""
        future: asyncio.Future[Progress | None] = asyncio.get_running_loop().create_future()
        self._waiting[file_id][future] = seen
        self._bell.ring()  # the file may have changed before it was waited for
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            return seen
        finally:
            del self._waiting[file_id][future]
            if not self._waiting[file_id]:
                del self._waiting[file_id]

    async def _watch(self) -> None:
        while self._waiting:
            started = time.monotonic()
            self._bell.silence()
            try:
                # A file that gets its first waiter during the query is left for the next tick.
                asked = list(self._waiting)
                found = await asyncio.to_thread(self._catalog.progress, asked)
                for file_id in asked:
                    self._wake(file_id, found.get(file_id))
            except Exception:
                logger.exception("the catalog could not be asked; questions go on waiting")
            await asyncio.sleep(max(_TICK_SECONDS, _SHARE * (time.monotonic() - started)))
            while self._may_rest() and time.monotonic() < started + _REST_SECONDS:
                if await self._bell.wait(_STOP_SECONDS):
                    break

    def _may_rest(self) -> bool:
        """Whether nobody waits for anything that no notice tells of."""
        everybody = (seen for waiting in self._waiting.values() for seen in waiting.values())
        return self._bell.is_heard and not self._is_stopping() and all(seen is None for seen in everybody)

    def _wake(self, file_id: str, progress: Progress | None) -> None:
        has_ended = self._is_stopping() or progress is None or progress[0] not in IN_WORK
        for future, seen in self._waiting.get(file_id, {}).items():
            if not future.done() and (has_ended or seen not in (None, progress)):
                future.set_result(None if has_ended else progress)
