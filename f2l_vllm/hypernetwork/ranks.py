"""LoRA ranks that an engine can be started with, and what to say where one is too small."""

from __future__ import annotations

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's `--max-lora-rank` may be one of these (`config/lora.py`, `MaxLoRARanks`)."""


def smallest_rank(rank: int) -> int | None:
    """The smallest rank vLLM takes that holds an adapter of `rank`, or None.

    Every slot has room for it, and a GPU computes every adapter at it (`lora/layers/base_linear.py`); a CPU computes
    an adapter at its own rank.
    """
    return next((size for size in RANKS if size >= rank), None)


def most_chunks(chunk_rank: int) -> int:
    """How many chunks of this rank an adapter can hold at all; the bias takes the rank of one. 0: not even one."""
    return max(0, RANKS[-1] // chunk_rank - 1)


def advice(rank: int) -> str:
    """What to do about adapters of a rank that the engine has no room for: only what vLLM would take."""
    allowed = smallest_rank(rank)
    if allowed is not None:
        return f"start it with --max-lora-rank {allowed} or more"
    return f"vLLM's largest is {RANKS[-1]}: make them of fewer chunks, or with a hypernetwork of a smaller rank"
