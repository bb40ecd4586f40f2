"""What every training stage shares: progress reports, random sources, batches of filmed scenes."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from f2l_vllm.training.render import pixel_values
from f2l_vllm.training.world import Scene

# Called with the stage's name and how much of it is done, from 0 to 1.
Progress = Callable[[str, float], None]

_LOG_EVERY = 25
_log = logging.getLogger(__name__)
# (width, height): what cameras, phones and screens make
FRAME_SIZES = ((320, 240), (640, 360), (240, 240), (270, 480), (240, 320))
_SIZE_WEIGHTS = (4, 3, 2, 1, 1)


@dataclass(slots=True)
class Randomness:
    """Random sources of one name, seed and process.

    Attributes:
        rng, torch_rng: this process's own.
        shared: draws the same in every process: what decides how long a step takes.
    """

    rng: random.Random
    torch_rng: torch.Generator
    shared: random.Random

    @classmethod
    def of(cls, name: str, seed: int, process: int = 0) -> Randomness:
        rng = random.Random(f"{name}:{seed}:{process}")
        return cls(rng, torch.Generator().manual_seed(rng.randrange(1 << 31)), random.Random(f"{name}:{seed}"))


@contextmanager
def one_thread() -> Iterator[None]:
    """Two threads are no faster at this model's size, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def draw_size(rng: random.Random) -> tuple[int, int]:
    return rng.choices(FRAME_SIZES, _SIZE_WEIGHTS)[0]


def film(
    scenes: Sequence[Scene],
    times_BT: Tensor,
    size: tuple[int, int],
    processor: SmolVLMVideoProcessor,
    randomness: Randomness,
) -> Tensor:
    """Pixel values [B, T, 3, Y, X] with the small variations of real footage."""
    return pixel_values(scenes, times_BT, size, processor, randomness.torch_rng)


def report(on_progress: Progress | None, stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
    """Say that step `step` (from 0) is done; every now and then log the figures too."""
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
