"""LoRA ranks that an engine can be started with, and the advice for one that is too small."""

from __future__ import annotations

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank` (`config/lora.py`, `MaxLoRARanks`)."""


def smallest_rank(rank: int) -> int | None:
    """The smallest rank that vLLM accepts and that holds an adapter of `rank`, or None.

    Every slot has room for this rank, and a GPU computes every adapter at it (`lora/layers/base_linear.py`); a CPU
    computes an adapter at its own rank.
    """
    return next((size for size in RANKS if size >= rank), None)


def most_chunks(chunk_rank: int) -> int:
    """Largest number of chunks of this rank in an adapter; the bias takes the rank of one. 0: not even one fits."""
    return max(0, RANKS[-1] // chunk_rank - 1)


def advice(rank: int) -> str:
    """What to do about adapters whose rank is too large for the engine; advises only what vLLM would accept."""
    allowed = smallest_rank(rank)
    if allowed is not None:
        return f"start it with --max-lora-rank {allowed} or more"
    return f"vLLM's largest is {RANKS[-1]}: make them of fewer chunks, or with a hypernetwork of a smaller rank"
