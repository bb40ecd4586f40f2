"""Waiting for videos: however many questions wait, the catalog is asked once per tick for all of them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable

from f2l_vllm.adapters.catalog import Catalog
from f2l_vllm.adapters.states import IN_WORK

logger = logging.getLogger(__name__)
_TICK_SECONDS = 0.03


class Watcher:
    """Wakes questions when the file they wait for leaves the states of work, or the server stops."""

    def __init__(self, catalog: Catalog, is_stopping: Callable[[], bool]) -> None:
        self._catalog = catalog
        self._is_stopping = is_stopping
        self._waiting: dict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._task: asyncio.Task[None] | None = None

    async def wait(self, file_id: str, seconds: float) -> None:
        """Return when the file is out of work (ready, failed or gone), when the server stops, or after `seconds`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[file_id].add(future)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            await asyncio.wait_for(future, seconds)
        except TimeoutError:
            pass
        finally:
            self._waiting[file_id].discard(future)
            if not self._waiting[file_id]:
                del self._waiting[file_id]

    async def _watch(self) -> None:
        while self._waiting:
            try:
                # Questions that begin to wait during the query are not in it: they are left for the next tick.
                asked = list(self._waiting)
                states = await asyncio.to_thread(self._catalog.states, asked)
                for file_id in asked:
                    if self._is_stopping() or states.get(file_id) not in IN_WORK:
                        self._wake(file_id)
            except Exception:
                logger.exception("the catalog could not be asked; questions go on waiting")
            await asyncio.sleep(_TICK_SECONDS)

    def _wake(self, file_id: str) -> None:
        for future in self._waiting.get(file_id, ()):
            if not future.done():
                future.set_result(None)
