"""What one server of a catalog does for all: ends what is due, removes what is left, shows what the catalog holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.server import metrics
from f2l_vllm.server.videos.keeping import Keeper, Write
from f2l_vllm.store.errors import Unavailable

_DUTY = "janitor"
_CLEANING_SECONDS = 60.0
_GONE_SECONDS = 3600.0  # how long a deleted file still works as the cursor of a file list
_AT_ONCE = 200  # files that one transaction expires
_EXPIRED_AT_ONCE = 20_000  # in one round

Step = Callable[[], Coroutine[Any, Any, None]]


class Janitor:
    """Every server has one; one of them at a time holds the duty.

    Args:
        name: this server's lasting name, so that it has the duty again at once when it was killed and is back.
        write: runs a catalog method that may wait for other writers.
    """

    def __init__(self, catalog: Catalog, keeper: Keeper, name: Callable[[], str], write: Write) -> None:
        self._catalog, self._keeper, self._name, self._write = catalog, keeper, name, write
        self._cleaned = -_CLEANING_SECONDS
        self.has_duty = False

    async def tidy(self) -> None:
        """Do what is due, if this server has the duty; to be called every few seconds.

        Raises:
            Unavailable: as `try_all` does.
        """
        self.has_duty = False
        try:
            self.has_duty = await self._write(self._catalog.hold_duty, _DUTY, self._name())
        finally:
            if not self.has_duty:
                _show({}, 0, 0, 0, (0, 0.0))
        if self.has_duty:
            await try_all(self._expire, self._clean, self._keeper.bury_all, self._count)

    def leave(self) -> None:
        """Let another server take the duty. Runs in a thread."""
        if self.has_duty:
            self._catalog.leave_duties(self._name())

    async def _expire(self) -> None:
        for _ in range(0, _EXPIRED_AT_ONCE, _AT_ONCE):
            removals = await self._write(self._catalog.expire_files, self._catalog.now(), _AT_ONCE)
            await self._keeper.bury([one for removal in removals for one in removal.doomed])
            if len(removals) < _AT_ONCE:
                return

    async def _clean(self) -> None:
        if time.monotonic() - self._cleaned < _CLEANING_SECONDS:
            return
        await self._write(self._catalog.purge, self._catalog.now() - _GONE_SECONDS)
        await self._write(self._catalog.purge_batches)
        await self._write(self._catalog.purge_uploads)
        await self._write(self._catalog.purge_streams)
        await self._keeper.bury(await self._write(self._catalog.drop_abandoned))
        await self._write(self._catalog.reopen_late)
        self._cleaned = time.monotonic()

    async def _count(self) -> None:
        states, queued, running = await asyncio.to_thread(self._catalog.counts)
        stored, left = await asyncio.to_thread(lambda: (self._catalog.stored_bytes(), self._catalog.leftovers()))
        _show(states, queued, running, stored, left)


async def try_all(*steps: Step) -> None:
    """Run each of these.

    Raises:
        Unavailable: the error of the first step that failed; all others were still tried.
    """
    failure: Unavailable | None = None
    for step in steps:
        try:
            await step()
        except Unavailable as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _show(states: dict[str, int], queued: int, running: int, stored: int, left: tuple[int, float]) -> None:
    """Set the catalog's gauges. They are 0 on the other servers, so that sums over servers are right."""
    for state in VideoState:
        metrics.VIDEOS.labels(state.value).set(states.get(state.value, 0))
    metrics.JOBS.labels("queued").set(queued)
    metrics.JOBS.labels("running").set(running)
    metrics.STORED_BYTES.set(stored)
    metrics.LEFTOVERS.set(left[0])
    metrics.LEFTOVER_SECONDS.set(left[1])
