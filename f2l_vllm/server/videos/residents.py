"""The adapters that a server keeps ready before anybody asks: of several servers one has each, its home."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.rendezvous import home
from f2l_vllm.server.registry import Registry
from f2l_vllm.store.store import Store, StoreError

logger = logging.getLogger(__name__)
_PREPARED_AT_ONCE = 256


class Residents:
    """Copies adapters into memory, pins them there and loads them into the engine.

    Args:
        revision: identifies this server's models and sampling.
        name: this server's lasting name.
    """

    def __init__(
        self, catalog: Catalog, store: Store, registry: Registry, revision: str, name: Callable[[], str]
    ) -> None:
        self._catalog, self._store, self._registry = catalog, store, registry
        self._revision, self._name = revision, name
        self._servers: list[str] = []  # those with the same models, by their lasting names
        self._prepared: int | None = None  # the id of the last adapter that was copied into memory

    async def warm(self, limit: int) -> None:
        """Make the `limit` most recently used adapters resident whose home this is, so that questions need no load."""
        await asyncio.to_thread(self._pin)
        recent = await asyncio.to_thread(self._catalog.recent_adapters, limit * max(1, len(self._servers)))
        for adapter in [adapter for adapter in recent if self._is_home(adapter.name)][:limit]:
            try:
                (await self._registry.acquire(adapter, asked=False)).release()
            except Exception as error:  # a question about it will report the error
                logger.warning("adapter %s was not made resident: %s", adapter.name, error)

    def keep(self) -> None:
        """Keep the pinned adapters and those made since the last call in memory, if this is their home. Runs in a
        thread."""
        self._pin()
        if self._prepared is None:
            self._prepared = self._catalog.newest_adapter()
        for adapter in self._catalog.adapters_after(self._prepared, _PREPARED_AT_ONCE):
            self._prepared = adapter.id
            try:
                if self._is_home(adapter.name):
                    self._store.prepare(adapter.object)
            except StoreError as error:  # deleted meanwhile, or a question about it will report the error
                logger.info("an adapter was not copied into memory: %s", error)

    def _is_home(self, adapter_name: str) -> bool:
        return home(adapter_name, self._servers) in (self._name(), None)

    def _pin(self) -> None:
        self._servers = self._catalog.servers(self._revision)
        pinned = self._catalog.pinned_adapters()
        self._store.pin({name for name in pinned if self._is_home(name.partition(".")[0])})
