"""The registry: the adapters that the engine can be asked for, each held by a lease while a question uses it.

`add_lora` loads an adapter before the first question about it is generated, under its name in the store and the int id
of the catalog. The adapter then enters vLLM's dynamic registry. The engine's host memory has a fixed number of
places, and only this registry evicts: unused adapters, least recently used first. The next adapter gets the place at
once, so that the engine hears of the eviction and the load between the same two steps. A deleted adapter leaves when
its last lease ends: first its name, then the engine, then its files, with those in the store if it was deleted here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from f2l_vllm import tracing
from f2l_vllm.catalog.tables import AdapterRecord, Tombstone
from f2l_vllm.server import metrics, vllm_api
from f2l_vllm.server.errors import APIError, adapter_unavailable
from f2l_vllm.store.store import Store, StoreError

logger = logging.getLogger(__name__)

_LOADS = 2
_REMOVERS = 8  # threads that remove adapters from the store, so that nothing else waits for one
_PLACE_SECONDS = 20.0  # how long a question waits while every place holds an adapter in use
_LEAVE_SECONDS = 30.0  # the engine may still run a question whose client has gone, until the abort arrives


class AdapterLost(RuntimeError):
    """A published adapter is missing or damaged on disk."""


@dataclass(eq=False)
class _Entry:
    record: AdapterRecord
    key: str
    request: Any
    loading: asyncio.Task[None] | None = None  # when done, the adapter is resident
    leases: int = 0
    doomed: bool = False
    is_ours: bool = False  # doomed by a deletion on this server


class Lease:
    """Holds an adapter for one question; `release` may be called more than once."""

    def __init__(self, registry: Registry, entry: _Entry) -> None:
        self._registry, self._entry = registry, entry
        self._held = True
        self.adapter = entry.record
        self.key = entry.key

    async def confirm(self) -> bool:
        """Whether the engine still has the adapter; if not, the next question about it loads it again."""
        return await self._registry._confirm(self._entry)

    def release(self) -> None:
        """Give the adapter up when the question has ended."""
        if self._held:
            self._held = False
            self._registry._loop.call_soon_threadsafe(self._registry._release, self._entry)


class Registry:
    """Adapters known to one API server and its engine. Used from the server's event loop only."""

    def __init__(
        self,
        names: MutableMapping[str, Any],
        engine: Any,
        store: Store,
        *,
        base_model: str,
        host_slots: int,
        wanted: Callable[[str], bool],
        place_seconds: float = _PLACE_SECONDS,
    ) -> None:
        """`names` is vLLM's registry; `wanted(name)` says whether the catalog refers to the files of this name.

        Raises:
            ValueError: the operator's own adapters in `names` leave no place in the engine.
        """
        places = host_slots - len(names)
        if places < 1:
            raise ValueError(
                f"--lora-modules names {len(names)} adapters and the engine keeps {host_slots}: videos need places "
                "too, so start it with a larger --max-cpu-loras"
            )
        self._names = names
        self._engine = engine
        self._store = store
        self._base_model = base_model
        self._wanted = wanted
        self._place_seconds = place_seconds
        self._loop = asyncio.get_running_loop()
        self._entries: dict[str, _Entry] = {}  # by name in the store: in use, or idle and resident
        self._idle: OrderedDict[str, _Entry] = OrderedDict()  # those without a lease, least recently used first
        self._leaving: dict[str, asyncio.Task[None]] = {}  # by name in the store: being removed from the engine
        self._free = places
        self._waiting: deque[asyncio.Future[None]] = deque()  # loads without a place; no adapter is idle while any wait
        self._used: dict[str, float] = {}  # adapter names, and when they were last asked for, this host's Unix seconds
        # vLLM's other routes accept any key of its registry as a model. Only this server's handlers know the keys, so
        # nobody can bypass them and use an adapter without a lease, or one of another caller's file.
        self._secret = secrets.token_hex(16)
        self._tasks: set[asyncio.Task[None]] = set()
        self._removers = ThreadPoolExecutor(_REMOVERS, "f2l-remove")

    async def acquire(self, record: AdapterRecord, *, asked: bool = True) -> Lease:
        """Make the adapter resident and hold it. `asked`: for a question, which counts as a use.

        Raises:
            AdapterLost: its files are missing or damaged.
            APIError: `too_many_videos_in_use`: every place in the engine is held, and none came free in time;
                `adapter_unavailable`: the files are sound, but the engine cannot load them. After any error nothing
                is registered.
        """
        name = record.object
        entry = self._entries.get(name)
        if entry is None:
            path = str(self._store.adapter_path(name))
            request = vllm_api.new_lora_request(name, record.id, path, self._base_model)
            entry = self._entries[name] = _Entry(record, f"{name}:{self._secret}", request)
        # The weights behind a name never change. So a composed adapter that is deleted and published again while in use
        # keeps the int id that the engine knows until its leases end.
        entry.leases += 1
        self._idle.pop(name, None)
        if asked:
            self._used[record.name] = time.time()
        metrics.LEASES.inc()
        lease = Lease(self, entry)
        if entry.loading is None:
            entry.loading = self._start(self._load(entry, asked))
        try:
            await asyncio.shield(entry.loading)  # others may wait for this load when the client goes away
        except BaseException:
            lease.release()
            raise
        return lease

    def holds(self, name: str) -> bool:
        """Whether the engine may still load this adapter's files."""
        return name in self._entries or name in self._leaving

    def take_used(self) -> dict[str, float]:
        """The names of the adapters that were asked for since the last call, with the time of the last request."""
        used, self._used = self._used, {}
        return used

    def names(self) -> list[str]:
        """The adapters that the engine has, or is about to have."""
        return [*self._entries, *self._leaving]

    async def remove(self, record: AdapterRecord | Tombstone) -> None:
        """Remove an adapter once nobody uses it, and delete its files. Returns at once if there are leases."""
        # The removal continues if the caller is cancelled.
        await asyncio.shield(self._start(self._remove(record.object, is_ours=True)))

    async def forget(self, name: str) -> None:
        """Remove an adapter that another server deleted. That server deletes the files in the store."""
        await asyncio.shield(self._start(self._remove(name, is_ours=False)))

    async def _remove(self, name: str, *, is_ours: bool) -> None:
        while True:
            entry = self._entries.get(name)
            if entry is not None and name not in self._idle:
                entry.doomed, entry.is_ours = True, entry.is_ours or is_ours
                return
            if entry is not None:
                self._retire(entry)
                self._give_place()
            if name not in self._leaving:
                break
            await asyncio.shield(self._leaving[name])

        def remove_files() -> None:
            if self._wanted(name):  # a composed one, made again meanwhile
                return
            if is_ours:
                self._store.remove_adapter(name)
            else:
                self._store.forget_adapter(name)

        await self._loop.run_in_executor(self._removers if is_ours else None, remove_files)

    async def _load(self, entry: _Entry, asked: bool) -> None:
        name = entry.record.object
        try:
            if name in self._leaving:
                await asyncio.shield(self._leaving[name])
            # A deletion from here on waits for this entry; an adapter that was deleted earlier is not loaded.
            if not await asyncio.to_thread(self._wanted, name):
                raise AdapterLost(f"the adapter {name} was deleted a moment ago")
            with tracing.span("load", adapter=name):
                entry.request.lora_path = await self._path(name)
                await self._take_place()
                await asyncio.sleep(0)  # the eviction goes first: the engine has no spare place
                try:
                    await self._add(entry)
                except BaseException:
                    self._give_place()
                    raise
        except BaseException:
            del self._entries[name]  # the next question starts a new load
            if entry.doomed:
                self._start(self._remove(entry.record.object, is_ours=entry.is_ours))
            raise
        self._names[entry.key] = entry.request
        metrics.RESIDENT.inc()
        if asked:
            metrics.LOADED.inc()
        if entry.leases == 0:  # all clients went away meanwhile
            self._rest(entry)

    async def _add(self, entry: _Entry) -> None:
        """Make the engine load it. Retry a failure, because files may have been damaged since they were verified."""
        name = entry.record.object
        for _ in range(_LOADS):
            try:
                await self._engine.add_lora(entry.request)
                return
            except Exception as error:
                if vllm_api.is_engine_dead(error):
                    raise
                logger.warning("adapter %s could not be loaded: %s", name, error)
            self._store.distrust(name)
            entry.request.lora_path = await self._path(name)
        raise adapter_unavailable()

    async def _path(self, name: str) -> str:
        try:
            path = self._store.load_path_at_once(name) or await asyncio.to_thread(self._store.load_path, name)
        except StoreError as error:
            raise AdapterLost(str(error)) from error
        return str(path)

    async def _confirm(self, entry: _Entry) -> bool:
        name = entry.record.object
        if self._entries.get(name) is not entry:
            return False
        if entry.request.lora_int_id in await self._engine.list_loras():
            return True
        if self._entries.get(name) is entry and entry.key in self._names:  # no other call has noticed meanwhile
            logger.warning("adapter %s is no longer in the engine", name)
            del self._entries[name], self._names[entry.key]
            self._idle.pop(name, None)
            metrics.RESIDENT.dec()
            self._store.distrust(name)
            self._give_place()
            if entry.doomed:
                self._start(self._remove(entry.record.object, is_ours=entry.is_ours))
        return False

    async def _take_place(self) -> None:
        if self._free:
            self._free -= 1
        elif self._idle:
            self._retire(next(iter(self._idle.values())))
        else:
            await self._wait_for_place()

    async def _wait_for_place(self) -> None:
        place = self._loop.create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(self._place_seconds):
                await place
        except TimeoutError:
            if not place.cancelled():  # the place came at the same moment
                self._give_place()
            message = (
                "Every place for a video in the engine is taken by questions being answered. Ask again in some "
                "seconds; the operator can raise --max-cpu-loras."
            )
            headers = {"Retry-After": "5"}
            raise APIError(HTTPStatus.SERVICE_UNAVAILABLE, "too_many_videos_in_use", message, headers=headers) from None

    def _give_place(self) -> None:
        """Give a free place to the load that has waited longest."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    def _release(self, entry: _Entry) -> None:
        entry.leases -= 1
        metrics.LEASES.dec()
        if entry.leases == 0 and self._entries.get(entry.record.object) is entry and entry.key in self._names:
            self._rest(entry)

    def _rest(self, entry: _Entry) -> None:
        """Make an entry idle after its last lease has ended."""
        self._idle[entry.record.object] = entry
        if entry.doomed:
            self._start(self._remove(entry.record.object, is_ours=entry.is_ours))
        elif self._waiting:
            self._retire(entry)
            self._give_place()

    def _retire(self, entry: _Entry) -> None:
        """Hide an adapter at once and remove it from the engine soon. The caller must reuse or free its place."""
        name = entry.record.object
        del self._entries[name], self._idle[name], self._names[entry.key]
        metrics.RESIDENT.dec()
        self._leaving[name] = self._start(self._leave(entry))

    async def _leave(self, entry: _Entry) -> None:
        name, deadline = entry.record.object, self._loop.time() + _LEAVE_SECONDS
        try:
            while not await self._engine.remove_lora(entry.request.lora_int_id):
                if self._loop.time() > deadline:
                    raise TimeoutError("a question still uses it")
                await asyncio.sleep(0.05)
        except Exception:
            logger.exception("adapter %s could not be removed from the engine", name)
        finally:
            del self._leaving[name]

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run in the background. Awaiting the task raises its error, but nobody has to await it."""
        task = self._loop.create_task(work)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()

        task.add_done_callback(ended)
        return task
