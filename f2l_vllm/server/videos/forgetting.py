"""Removes what any server of the catalog has deleted: from this server's engine, disk and memory."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.servers import SERVER_SECONDS
from f2l_vllm.catalog.tables import Tombstone
from f2l_vllm.files import lasting_name
from f2l_vllm.server.catalog_keys import CatalogKeys
from f2l_vllm.server.registry import Registry
from f2l_vllm.store.address import ADAPTER_PREFIX
from f2l_vllm.store.store import Store

logger = logging.getLogger(__name__)
_TICK_SECONDS = 0.1
_BEAT_SECONDS = 5.0
_AT_ONCE = 100

Write = Callable[..., Coroutine[Any, Any, Any]]


class Memory(Protocol):
    """What a server keeps of videos beside its store. Threads call it."""

    def names(self) -> list[str]:
        """The videos of which anything is kept."""

    def forget(self, video: str) -> None:
        """Drop all of it."""


class Forgetting:
    """One server's part in every deletion. Lives on that server's event loop.

    Args:
        keys: those that this server knows.
        revision: identifies this server's models and sampling.
        write: runs a catalog method that may wait for other writers.
    """

    def __init__(
        self, catalog: Catalog, store: Store, registry: Registry, keys: CatalogKeys, revision: str, write: Write
    ) -> None:
        self._catalog, self._store, self._registry, self._write = catalog, store, registry, write
        self._keys, self._revision = keys, revision
        self.name = ""  # the server's lasting name, and its id in the catalog, once it has joined
        self.server = ""
        self._seen = 0  # the last deletion that was handled
        self._in_use: dict[int, str] = {}  # deletions whose adapters are still used by answers
        self._said, self._said_at = (-1, -1), 0.0
        self._has_joined, self._heard_at = False, float("-inf")
        self._memories: list[Memory] = []

    def include(self, memory: Memory) -> None:
        """Have deleted videos removed from here, too."""
        self._memories.append(memory)

    async def join(self) -> None:
        """Register this server and remove everything that was deleted while it was away. If this is interrupted by an
        error, it has not joined, and does so with the next `forget`."""
        self._has_joined = False
        place = f"{socket.gethostname()}:{self._store.home.resolve()}"
        self.name = await asyncio.to_thread(_name, self._store.home, place)
        self.server, self._seen = await self._write(self._catalog.join_server, self.name, self._revision, place)
        self._in_use = {}
        await self._keys.read()
        kept = {*await asyncio.to_thread(self._store.kept), *self._registry.names()}
        kept.update(name for memory in self._memories for name in memory.names())
        gone = kept - await asyncio.to_thread(self._catalog.named, kept)
        for name in gone:
            if name.startswith(ADAPTER_PREFIX):
                await self._forget_adapter(name, self._seen)
            else:
                await asyncio.to_thread(self._forget_video, name)
        if gone:
            logger.info("%d adapters and videos were deleted while this server was away, and are forgotten", len(gone))
        self._has_joined = True
        await self._say()

    async def forget(self) -> None:
        """Remove what was deleted since the last call."""
        if not self.has_joined:
            await self.join()
        while page := await asyncio.to_thread(self._catalog.deletions_after, self._seen, _AT_ONCE):
            await self._forget(page)
            self._seen = page[-1].seq
            await self._beat()
        await self._beat()

    def leave(self) -> None:
        """Tell the catalog that this server stops. Runs in a thread."""
        self._catalog.leave_server(self.server)

    async def erased(self, deletions: list[Tombstone], seconds: float) -> bool:
        """Wait at most `seconds` until no server has anything left of these deletions. Returns whether that is so."""
        deadline = time.monotonic() + seconds
        numbers = [deletion.seq for deletion in deletions]
        while not await asyncio.to_thread(self._catalog.is_erased, numbers):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_TICK_SECONDS)
        return True

    @property
    def has_joined(self) -> bool:
        """Whether deletions wait for this server, which then has at most the last few to remove. They do not if the
        catalog may count it as silent: it has to join again."""
        return self._has_joined and time.monotonic() - self._heard_at < SERVER_SECONDS

    @property
    def _applied(self) -> int:
        return min(self._in_use, default=self._seen + 1) - 1

    async def _beat(self) -> None:
        """Tell how far this server has come if that is news, and that it runs."""
        self._in_use = {seq: name for seq, name in self._in_use.items() if self._registry.holds(name)}
        if (self._applied, self._seen) != self._said or time.monotonic() - self._said_at >= _BEAT_SECONDS:
            await self._say()

    async def _forget(self, page: list[Tombstone]) -> None:
        for deletion in page:
            if deletion.is_key:
                await self._keys.forget(deletion.name)
        gone = await asyncio.to_thread(self._forget_videos, page)
        await asyncio.gather(*(self._forget_adapter(one.object, one.seq) for one in gone))

    def _forget_videos(self, page: list[Tombstone]) -> list[Tombstone]:
        """Drop the bytes of videos; returns the adapters to be forgotten. Runs in a thread."""
        for deletion in page:
            if deletion.is_video:
                self._forget_video(deletion.object)
        adapters = [deletion for deletion in page if not deletion.is_video and not deletion.is_key]
        again = self._catalog.published([one.object for one in adapters])  # composed ones are made again
        return [one for one in adapters if one.object not in again]

    def _forget_video(self, name: str) -> None:
        self._store.forget_video(name)
        for memory in self._memories:
            memory.forget(name)

    async def _forget_adapter(self, name: str, seq: int) -> None:
        await self._registry.forget(name)
        if self._registry.holds(name):
            self._in_use[seq] = name

    async def _say(self) -> None:
        said, started = (self._applied, self._seen), time.monotonic()
        if not await self._write(self._catalog.beat_server, self.server, *said):
            logger.warning("the other servers have not heard from this one for too long: it joins them again")
            await self.join()
            return
        self._said, self._said_at, self._heard_at = said, time.monotonic(), started
        self._keys.hear(started)


def _name(home: Path, place: str) -> str:
    """The lasting name of the server that runs on this data folder. A copy of the folder has another one."""
    name = f"{lasting_name(home / 'server.name')}@{place}"
    return hashlib.sha256(name.encode()).hexdigest()[:32]
