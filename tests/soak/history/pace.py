"""Time that runs faster in the processes of a history: who is silent is given up after seconds, not after a minute."""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Callable
from typing import Any

from f2l_vllm.store.cached_store import CachedStore
from f2l_vllm.store.store import Store

SILENT_SECONDS = 6.0  # a server or pool that is silent for longer is given up
BEAT_SECONDS = 0.5
_CONSTANTS: dict[str, Any] = {
    "catalog.servers.SERVER_SECONDS": SILENT_SECONDS,
    "catalog.revisions.SERVER_SECONDS": SILENT_SECONDS,
    "server.catalog_keys.SERVER_SECONDS": SILENT_SECONDS,
    "catalog.jobs.LEASE_SECONDS": SILENT_SECONDS,
    "catalog.duties.HELD_SECONDS": SILENT_SECONDS / 2,
    "catalog.tombstones._RESERVED_SECONDS": 10.0,
    "server.videos.forgetting.SERVER_SECONDS": SILENT_SECONDS,
    "server.videos.forgetting._BEAT_SECONDS": BEAT_SECONDS,
    "server.videos.membership._TICK_SECONDS": 0.1,
    "server.videos.routes._ERASED_SECONDS": 4 * SILENT_SECONDS,
    "server.videos.service._MAINTENANCE_SECONDS": 1.0,
    "server.videos.service._CLEANING_SECONDS": 5.0,
    "server.videos.service._SWEEP_SECONDS": 5.0,
    "server.videos.janitor._CLEANING_SECONDS": 5.0,
    "server.videos.janitor._GONE_SECONDS": 60.0,
    "server.videos.uploads._EXPIRY_SECONDS": (1, 2592000),
}
_YOUNG_SECONDS = 2.0
_SWEPT_SECONDS = 20.0  # longer than anybody stands still
_FAR_CALLS = frozenset({"put_file", "get_file", "rm_file", "rm", "info", "find"})


def hurry() -> None:
    """Set this process's clock-work; call it before anything starts."""
    for name, value in _CONSTANTS.items():
        module, _, constant = name.rpartition(".")
        found = importlib.import_module(f"f2l_vllm.{module}")
        assert hasattr(found, constant), name
        setattr(found, constant, value)
    CachedStore.trim.__defaults__ = (_YOUNG_SECONDS,)
    CachedStore.sweep.__defaults__ = (_SWEPT_SECONDS,)


def put_far(store: Store, most_seconds: float) -> None:
    """Have each call to the object store take up to twice so long, as over a network."""
    assert isinstance(store, CachedStore)
    store._remote._files = _Far(store._remote._files, most_seconds)


class _Far:
    def __init__(self, files: Any, most_seconds: float) -> None:
        self._files, self._most = files, most_seconds

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._files, name)
        return self._late(found) if name in _FAR_CALLS else found

    def _late(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def late(*args: Any, **values: Any) -> Any:
            time.sleep(random.uniform(0, self._most))
            try:
                return call(*args, **values)
            finally:
                time.sleep(random.uniform(0, self._most))

        return late
