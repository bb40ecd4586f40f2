"""The catalog's keys in one server's memory, so that a request with a known key asks no database."""

from __future__ import annotations

import asyncio
import time

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.servers import SERVER_SECONDS
from f2l_vllm.server.tenants import Keys
from f2l_vllm.settings import CATALOG
from f2l_vllm.store.errors import CatalogBusy

_REST_SECONDS = 1.0  # between two readings, however many keys are guessed


class CatalogKeys(Keys):
    """The keys with `F2L_TENANTS=catalog`. Lives on the server's event loop.

    `Forgetting` tells it which keys were revoked. A revocation does not wait for a server that has been silent for
    `SERVER_SECONDS`, so no key is valid here once the catalog may count this server as silent.
    """

    def __init__(self, catalog: Catalog) -> None:
        super().__init__([], CATALOG)
        self._catalog = catalog
        self._lock = asyncio.Lock()  # what was read before a key was revoked is not kept after that
        self._rest_until = self._heard_at = float("-inf")
        self._has_read = False  # at the last attempt

    @property
    def is_empty(self) -> bool:
        """Whether the catalog has no keys."""
        return not self._tenants

    def tenant(self, authorization: str | None) -> str | None:
        """As in `Keys`; None, too, while this server cannot know which keys were revoked."""
        return super().tenant(authorization) if self._is_heard else None

    def knows(self, tenant: str) -> bool:
        """As in `Keys`; False, too, while this server cannot know which keys were revoked."""
        return super().knows(tenant) if self._is_heard else False

    async def look_again(self) -> None:
        """Learn of keys that were added lately: one reading of all keys, at most once a second.

        Raises:
            Unavailable: the catalog cannot be read, or this server cannot know which keys were revoked.
        """
        if not self._is_heard:
            raise CatalogBusy("this server has not heard lately which keys were revoked")
        async with self._lock:
            if time.monotonic() >= self._rest_until:
                await self._read()
            if not self._has_read:
                raise CatalogBusy("the keys could not be read a moment ago")

    async def read(self) -> None:
        """Compare with the catalog: from here on exactly its keys are known.

        Raises:
            Unavailable: the catalog cannot be read.
        """
        async with self._lock:
            await self._read()

    async def forget(self, sha256: str) -> None:
        """A key was revoked."""
        async with self._lock:
            self._tenants.pop(sha256, None)

    def hear(self, at: float) -> None:
        """The catalog counts this server as running since this moment of the monotonic clock, or later. It knows up to
        which revocation this server has forgotten keys, and waits for it with the next."""
        self._heard_at = at

    @property
    def _is_heard(self) -> bool:
        return time.monotonic() - self._heard_at < SERVER_SECONDS

    async def _read(self) -> None:
        self._has_read = False
        try:
            found = await asyncio.to_thread(self._catalog.api_keys)
        finally:
            self._rest_until = time.monotonic() + _REST_SECONDS
        self._tenants = {key.sha256: key.tenant for key in found}
        self._has_read = True
