"""Moves bytes into the store and out of it. `catalog/tombstones.py` has the rules that servers share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.tables import Bytes, FileRecord, Tombstone, Upload
from f2l_vllm.catalog.tombstones import VideoGone
from f2l_vllm.server.registry import Registry
from f2l_vllm.store.errors import CatalogBusy, Unavailable
from f2l_vllm.store.store import Store

logger = logging.getLogger(__name__)
_MOVERS = 4  # threads that move videos into the store, so that questions never wait for one
_REMOVERS = 8  # and threads that remove them
_AT_ONCE = 200
_PATIENCE_SECONDS = 5.0  # how long a removal is waited for: a store that does not answer is given up after a minute

Write = Callable[..., Coroutine[Any, Any, Any]]


class Keeper:
    """Enters uploads and their bytes, and removes what the catalog has deleted.

    Args:
        write: runs a catalog method that may wait for other writers.
    """

    def __init__(self, catalog: Catalog, store: Store, registry: Registry, write: Write) -> None:
        self._catalog, self._store, self._registry, self._write = catalog, store, registry, write
        self._movers = ThreadPoolExecutor(_MOVERS, "f2l-store")
        self._removers = ThreadPoolExecutor(_REMOVERS, "f2l-bury")
        self._burying: dict[int, asyncio.Task[None]] = {}  # by tombstone
        self._unused: list[Bytes] = []  # bytes of refused uploads that the catalog could not be told about

    async def enter(self, temporary: Path, upload: Upload, add: Callable[..., FileRecord]) -> FileRecord:
        """Enter a file with `add(video=…)`, sharing the bytes of other files if they exist, else storing its own.

        Raises:
            Unavailable: store or catalog cannot take it now. Errors of `add` also pass through. Nothing is kept then.
        """
        run = asyncio.get_running_loop().run_in_executor
        video: Bytes = await self._write(self._catalog.reserve_video, upload.sha256)
        if not video.is_new:
            is_whole = await run(self._movers, self._store.has_video, video.video, upload.bytes)
            if is_whole:
                try:
                    record: FileRecord = await self._write(add, video=video)
                    return record
                except VideoGone:  # deleted a moment ago
                    pass
            replaces = None if is_whole else video.generation
            video = await self._write(self._catalog.reserve_video, upload.sha256, anew=True, replaces=replaces)
        try:
            await run(self._movers, self._store.keep_video, temporary, video.video)
            record = await self._write(add, video=video)
            return record
        except VideoGone as error:
            raise CatalogBusy("the video took too long to be kept") from error
        except Exception:
            await self._give_back(video)
            raise

    async def bury(self, doomed: Sequence[Tombstone]) -> None:
        """Remove what the catalog has deleted from the store, and tell the catalog. Failures are retried later.

        After `_PATIENCE_SECONDS` it goes on in the background, as it does if the caller is cancelled.
        """
        new = [one for one in doomed if one.seq not in self._burying]
        if new:
            task = asyncio.create_task(self._bury(new))
            self._burying |= dict.fromkeys((one.seq for one in new), task)
        if under_way := {self._burying[one.seq] for one in doomed}:
            await asyncio.wait(under_way, timeout=_PATIENCE_SECONDS)

    async def _bury(self, doomed: Sequence[Tombstone]) -> None:
        try:
            are_gone = await asyncio.gather(*(self._remove(one) for one in doomed))
            if gone := [one for one, is_gone in zip(doomed, are_gone, strict=True) if is_gone]:
                await self._write(self._catalog.bury, gone)
        except Unavailable as error:
            logger.warning("%d removals are entered later: %s", len(doomed), error)
        except Exception:
            logger.exception("%d removals are entered later", len(doomed))
        finally:
            for one in doomed:
                del self._burying[one.seq]

    async def _remove(self, one: Tombstone) -> bool:
        """Whether it is gone from the store."""
        try:
            if not one.is_video:
                await self._registry.remove(one)
                return not self._registry.holds(one.object)  # a question may still use it
            run = asyncio.get_running_loop().run_in_executor
            await run(self._removers, self._store.remove_video, one.object)
            return True
        except Unavailable as error:
            logger.warning("%s is removed later: %s", one.object, error)
        except Exception:
            logger.exception("%s is removed later", one.object)
        return False

    async def give_back_unused(self) -> None:
        """Tell the catalog of refused uploads that it has not heard of yet."""
        unused, self._unused = self._unused, []
        for video in unused:
            await self._give_back(video)

    async def bury_all(self) -> None:
        """Remove what any server's deletions left in the store because it was killed or the store was unavailable."""
        await self.bury(await asyncio.to_thread(self._catalog.tombstones, _AT_ONCE))

    async def _give_back(self, video: Bytes) -> None:
        """Remove bytes that an upload put into the store but that were not entered in the catalog."""
        try:
            await self.bury(await self._write(self._catalog.give_back_video, video))
        except Unavailable as error:
            logger.warning("the bytes of a refused upload are removed later: %s", error)
            self._unused.append(video)
