"""Which videos share a pass, and what happens when a pass runs out of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")


def group_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in groups whose padded size, longest length times members, is at most `max_tokens`.

    Videos of similar length share a group; a video that alone exceeds the budget has its own group.

    Raises:
        ValueError: the budget is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}.")
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def run_groups(
    groups: Sequence[Sequence[int]], run: Callable[[Sequence[int]], Sequence[Result]]
) -> tuple[dict[int, Result], dict[int, BaseException]]:
    """Run every group; a group that runs out of memory is halved and tried again until it fits or has one member.

    Returns:
        results by index, and the errors of members that ran out of memory alone.

    Raises:
        BaseException: whatever else `run` raises.
    """
    results: dict[int, Result] = {}
    failures: dict[int, BaseException] = {}
    pending = [list(group) for group in reversed(groups)]
    while pending:
        group = pending.pop()
        try:
            results.update(zip(group, run(group), strict=True))
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(group) == 1:
                failures[group[0]] = error.with_traceback(None)
        # Free memory only here: before, the error still held the failed pass's tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(group) > 1:
            half = (len(group) + 1) // 2
            pending += [group[half:], group[:half]]
    return results, failures


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
