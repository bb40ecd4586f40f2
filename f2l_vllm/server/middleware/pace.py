"""Tenants' turns at the event loop, which reads everybody's requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

_BRIEF_SECONDS = 0.001  # shorter work is not counted
_BYTE_SECONDS = 1e-8  # what a body's byte costs the loop later: in the route, in vLLM's checks, in decoding base64
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
    def taking(self, tenant: str, size: int) -> Iterator[None]:
        """Count the time of this block as the tenant's, and what a body of this many bytes will still take. The block
        must not await anything."""
        began = time.monotonic()
        try:
            yield
        finally:
            if (taken := time.monotonic() - began + size * _BYTE_SECONDS) > _BRIEF_SECONDS:
                self._next[tenant] = began + (1 + _REST) * taken
