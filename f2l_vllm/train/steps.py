"""What every kind of training shares: progress reports, random sources, running losses."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Called with the stage's name and how much of it is done, from 0 to 1.
Progress = Callable[[str, float], None]

_LOG_EVERY = 25
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Randomness:
    """Random sources of one name, seed and process.

    Attributes:
        rng, torch_rng: this process's own.
        shared: draws the same in every process; for choices that decide how long a step takes.
    """

    rng: random.Random
    torch_rng: torch.Generator
    shared: random.Random

    @classmethod
    def of(cls, name: str, seed: int, process: int = 0) -> Randomness:
        rng = random.Random(f"{name}:{seed}:{process}")
        return cls(rng, torch.Generator().manual_seed(rng.randrange(1 << 31)), random.Random(f"{name}:{seed}"))

    @classmethod
    def of_part(cls, stage: str, step: int, part: int, parts: int, seed: int, process: int) -> Randomness:
        """The sources of one of the parts that a process computes of a step."""
        return cls.of(f"{stage}:{step}" if parts == 1 else f"{stage}:{step}:{part}", seed, process)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: two are no faster at this model's size, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def report(on_progress: Progress | None, stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
    """Report that step `step` (from 0) is done; now and then log the figures too."""
    if on_progress:
        on_progress(stage, (step + 1) / steps)
    if step % _LOG_EVERY == 0 or step == steps - 1:
        _log.info("%s %d/%d %s", stage, step + 1, steps, {name: round(value, 4) for name, value in figures.items()})


@dataclass(slots=True)
class Losses:
    """The first loss of a stage and a running average."""

    first: float = float("nan")
    smoothed: float = float("nan")
    count: int = 0

    def add(self, loss: float) -> None:
        if self.count == 0:
            self.first = self.smoothed = loss
        self.count += 1
        weight = max(0.05, 1 / self.count)
        self.smoothed += weight * (loss - self.smoothed)

    def summary(self) -> dict[str, float]:
        return {"first_loss": round(self.first, 4), "loss": round(self.smoothed, 4)}
