"""One task for all who want the same at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

K = TypeVar("K")
T = TypeVar("T")


async def once(running: dict[K, asyncio.Task[T]], key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `work` once for all concurrent callers with the same key. A caller that goes away does not stop it."""
    task = running.get(key)
    if task is None:
        task = running[key] = asyncio.create_task(work())

        def ended(task: asyncio.Task[T]) -> None:
            running.pop(key, None)
            if not task.cancelled():
                task.exception()  # mark the error as seen: all callers may have gone away

        task.add_done_callback(ended)
    return await asyncio.shield(task)
