"""An alarm that the catalog's notices ring for one task of the event loop."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from f2l_vllm.catalog.listener import Listener


class Bell:
    """Rings at notices of some payloads, from the first `silence` or `wait` on. Whoever waits silences it first and
    then looks at what may have changed.

    Args:
        listener: None: it never rings by itself.
    """

    def __init__(self, listener: Listener | None, *payloads: str) -> None:
        self._listener = listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rung = asyncio.Event()
        if listener is not None:
            for payload in payloads:
                listener.on(payload, self._ring_from_thread)

    @property
    def is_heard(self) -> bool:
        """Whether it rings at every notice."""
        return self._listener is not None and self._listener.is_heard

    def silence(self) -> None:
        """Forget that it rang; what rings from here on ends the next `wait`."""
        self._hear()
        self._rung.clear()

    def ring(self) -> None:
        """Ring it from the event loop."""
        self._rung.set()

    async def wait(self, seconds: float) -> bool:
        """Wait until it rings, at most so long. Returns whether it rang."""
        self._hear()
        try:
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        except TimeoutError:
            return False
        return True

    def _hear(self) -> None:
        self._loop = asyncio.get_running_loop()

    def _ring_from_thread(self) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._rung.set)
