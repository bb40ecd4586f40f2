"""A few places for many waiters, lent in turns: tenants take turns, and each sends its longest waiter."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """The places of one event loop.

    Args:
        places: the number of places.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def take(self, tenant: str) -> None:
        """Wait for a place. The caller must give it back."""
        if self._free and not self._waiting:
            self._free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.give_back()  # the place came at the moment of leaving
            raise

    def give_back(self) -> None:
        """Free a place for the next tenant."""
        self._free += 1
        while self._waiting and self._free:
            tenant, own = next(iter(self._waiting.items()))
            del self._waiting[tenant]
            place = own.popleft()
            if own:
                self._waiting[tenant] = own  # behind the others
            if not place.done():
                self._free -= 1
                place.set_result(None)
