"""The lessons of a process's steps, drawn and decoded ahead by worker processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from f2l_vllm.lifeline import end_with_spawner
from f2l_vllm.train.lessons import Lesson, Lessons

_MOST_WORKERS = 8
_AHEAD = 2  # parts that each worker keeps ready

Draw = Callable[[int], list[Lesson]]


def default_workers(device: torch.device) -> int:
    """The cores that a GPU's process has to itself but one, at most 8; 0 on a CPU, where decoding and computing would
    only take turns."""
    if device.type == "cpu":
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // processes - 1))


class Loader:
    """Gives one part of a step after the other.

    What a part holds depends on its number alone: neither how many processes decode nor where a run was stopped changes
    it. Workers are forked when the first part is taken.

    Args:
        lessons: what parts are drawn from. Videos that a part found unusable are entered in its `unusable` when the
            part is taken.
        draw: draws the part of a number from `lessons`.
        parts: how many there are.
        workers: processes that decode ahead; 0 decodes in this process, when a part is taken.

    Attributes:
        waited: seconds that `take` has taken so far.
    """

    def __init__(self, lessons: Lessons, draw: Draw, parts: int, workers: int) -> None:
        self.waited = 0.0
        self._lessons, self._parts, self._draw, self._workers = lessons, parts, draw, workers
        self._ahead: Iterator[_Drawn] | None = None

    def take(self, number: int) -> list[Lesson]:
        """The part of this number; after the first, numbers come one after the other.

        Raises:
            ValueError: as `Lessons.take`.
        """
        started = time.monotonic()
        try:
            if not self._workers:
                return self._draw(number)
            if self._ahead is None:
                self._ahead = self._start(number)
            lessons, unusable, error = next(self._ahead)
            self._lessons.leave_out(unusable)
            if error is not None:
                raise ValueError(error)
            return lessons
        finally:
            self.waited += time.monotonic() - started

    def close(self) -> None:
        """End the workers."""
        self._ahead = None  # DataLoader's iterator ends them when nothing refers to it

    def _start(self, first: int) -> Iterator[_Drawn]:
        return iter(
            DataLoader(
                _Parts(self._lessons, self._draw),
                batch_size=None,
                sampler=range(first, self._parts),
                num_workers=self._workers,
                prefetch_factor=_AHEAD,
                collate_fn=_unchanged,
                worker_init_fn=_end_with_trainer,
                multiprocessing_context="fork",  # the manifest and the processor need not be sent
                generator=torch.Generator(),  # it draws a seed, which must not come from the global generator
            )
        )


_Drawn = tuple[list[Lesson], dict[str, str], str | None]  # lessons, what was found unusable, why there are no lessons


class _Parts(Dataset[_Drawn]):
    """Draws parts in a worker."""

    def __init__(self, lessons: Lessons, draw: Draw) -> None:
        self._lessons, self._draw = lessons, draw

    def __getitem__(self, number: int) -> _Drawn:
        drawn: list[Lesson] = []
        error = None
        try:
            drawn = self._draw(number)
        except ValueError as reason:
            error = str(reason)
        return drawn, dict(self._lessons.unusable), error


def _end_with_trainer(_: int) -> None:
    """A worker whose trainer was killed would wait for ever to hand over what it has decoded."""
    end_with_spawner()


def _unchanged(part: Any) -> Any:
    return part
