"""Tenants' turns at the event loop, which reads everybody's requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

_BRIEF_SECONDS = 0.001  # shorter work is not counted
_REST = 3.0  # times the time taken, left to the others


class Pace:
    """After a tenant's request has held up the loop, its next one waits, so that others have most of the loop."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}  # tenant -> when, by the monotonic clock

    async def turn(self, tenant: str) -> None:
        """Wait until this tenant may hold up the loop again."""
        while (wait := self._next.get(tenant, 0.0) - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._next.pop(tenant, None)

    @contextmanager
    def taking(self, tenant: str) -> Iterator[None]:
        """Count the time of this block as the tenant's. The block must not await anything."""
        began = time.monotonic()
        try:
            yield
        finally:
            if (taken := time.monotonic() - began) > _BRIEF_SECONDS:
                self._next[tenant] = began + (1 + _REST) * taken
