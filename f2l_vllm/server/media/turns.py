"""A few places for many who wait, lent in turns: each tenant in its turn has one, with whoever of it waits longest."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Places of one event loop.

    Args:
        places: how many there are.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def take(self, tenant: str) -> None:
        """Wait for a place; who has one gives it back."""
        if self._free and not self._waiting:
            self._free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.give_back()  # it came at the moment of leaving
            raise

    def give_back(self) -> None:
        """A place is free for the next tenant."""
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
