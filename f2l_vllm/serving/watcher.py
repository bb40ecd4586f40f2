"""Waiting for videos: however many questions wait, the catalog is asked once per tick for all of them."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from f2l_vllm.adapters.catalog import Catalog
from f2l_vllm.adapters.states import IN_WORK

_TICK_SECONDS = 0.03


class Watcher:
    """Wakes questions when the file they wait for leaves the states of work."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._waiting: dict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._task: asyncio.Task[None] | None = None

    async def wait(self, file_id: str, seconds: float) -> None:
        """Return when the file is out of work (ready, failed or gone) or after `seconds`."""
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
            states = await asyncio.to_thread(self._catalog.states, list(self._waiting))
            for file_id in [key for key in self._waiting if states.get(key) not in IN_WORK]:
                for future in self._waiting[file_id]:
                    if not future.done():
                        future.set_result(None)
            await asyncio.sleep(_TICK_SECONDS)
