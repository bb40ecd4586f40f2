"""No garbage collection while libraries are imported.

What an import makes stays. A collector that goes through it again and again takes a fifth of the CPU time that torch,
transformers and vLLM need to be imported.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Collect no garbage inside. Collections afterwards leave out what there is then; as a decorator, the same for each
    call."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
