"""The registry: adapters that the engine may be asked for, each held by a lease while a question uses it.

An adapter enters vLLM's dynamic registry with its content-addressed name and the int id of the catalog, is loaded
by `add_lora` before any question is generated (so that a load never happens inside an engine step with its file
gone), and leaves only when no lease is left: name, then engine, then files.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from f2l_vllm.adapters.store import Store, StoreError
from f2l_vllm.adapters.tables import AdapterRecord
from f2l_vllm.serving import compat, metrics

logger = logging.getLogger(__name__)


class AdapterLost(RuntimeError):
    """A published adapter is missing or damaged on disk."""


@dataclass
class _Entry:
    record: AdapterRecord
    key: str
    request: Any
    leases: int = 0
    resident: bool = False
    doomed: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Lease:
    """Holds an adapter for one question; `release` may be called more than once."""

    def __init__(self, registry: Registry, entry: _Entry) -> None:
        self._registry, self._entry = registry, entry
        self._held = True
        self.adapter = entry.record
        self.key = entry.key

    def release(self) -> None:
        """The question has ended."""
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
    ) -> None:
        """`names` is vLLM's registry; `wanted(name)` says whether the catalog refers to an adapter's files again."""
        self._names = names
        self._engine = engine
        self._store = store
        self._base_model = base_model
        self._host_slots = host_slots
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # by adapter name, least recently used first
        # vLLM's other routes take any key of its registry as a model. Only this server's handlers know the keys, so
        # nobody reaches an adapter past them, without a lease or with another caller's file.
        self._secret = secrets.token_hex(16)
        self._tasks: set[asyncio.Task[None]] = set()

    async def acquire(self, record: AdapterRecord) -> Lease:
        """Make the adapter resident and hold it.

        Raises:
            AdapterLost: its files are missing or damaged.
            Exception: what the engine says when it cannot load them. Nothing is registered in either case.
        """
        entry = self._entries.get(record.name)
        if entry is None:
            path = str(self._store.adapter_path(record.name))
            request = compat.new_lora_request(record.name, record.id, path, self._base_model)
            entry = self._entries[record.name] = _Entry(record, f"{record.name}:{self._secret}", request)
        # Weights of a name never change, so an adapter that was deleted and published again while in use goes on
        # under the int id the engine knows.
        entry.doomed = False
        entry.leases += 1
        metrics.LEASES.inc()
        lease = Lease(self, entry)
        self._entries.move_to_end(record.name)
        try:
            async with entry.lock:
                if not entry.resident:
                    await self._load(entry)
        except BaseException:
            lease.release()
            raise
        return lease

    async def remove(self, record: AdapterRecord) -> None:
        """Take an adapter out once nobody uses it, and delete its files. Returns at once; leases are waited for."""
        entry = self._entries.get(record.name)
        if entry is None:
            await self._remove_files(record.name)
            return
        entry.doomed = True
        if entry.leases == 0:
            await self._bury(entry)

    async def _load(self, entry: _Entry) -> None:
        name = entry.record.name
        try:
            await asyncio.to_thread(self._store.verify_adapter, name)
        except StoreError as error:
            raise AdapterLost(str(error)) from error
        await self._engine.add_lora(entry.request)
        entry.resident = True
        self._names[entry.key] = entry.request
        self._forget_evicted()
        metrics.RESIDENT.set(len(self._entries))

    def _forget_evicted(self) -> None:
        """The engine keeps `host_slots` adapters, least recently used out first; idle ones beyond load again."""
        idle = [entry for entry in self._entries.values() if entry.leases == 0 and entry.resident]
        for entry in idle[: max(0, len(self._entries) - self._host_slots)]:
            self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        entry.resident = False
        if self._entries.get(entry.record.name) is entry:
            del self._entries[entry.record.name]
            self._names.pop(entry.key, None)
        metrics.RESIDENT.set(len(self._entries))

    def _release(self, entry: _Entry) -> None:
        entry.leases -= 1
        metrics.LEASES.dec()
        if entry.leases == 0 and not entry.resident:
            self._forget(entry)
        if entry.leases == 0 and entry.doomed:
            task = self._loop.create_task(self._bury(entry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _bury(self, entry: _Entry) -> None:
        self._forget(entry)
        try:
            await self._engine.remove_lora(entry.request.lora_int_id)
        except Exception:
            logger.exception("adapter %s could not be removed from the engine", entry.record.name)
        await self._remove_files(entry.record.name)

    async def _remove_files(self, name: str) -> None:
        if name not in self._entries and not self._wanted(name):  # not uploaded again meanwhile
            await asyncio.to_thread(self._store.remove_adapter, name)
