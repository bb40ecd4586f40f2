"""How long a run takes, said before its first step: one video is computed here, and shapes say what a step is of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

import torch

from f2l_vllm.train.data.manifest import Example
from f2l_vllm.train.lessons import Lesson, Lessons
from f2l_vllm.train.options import TrainingOptions
from f2l_vllm.train.steps import Randomness
from f2l_vllm.train.trainer import Trainer
from f2l_vllm.train.work import work_of
from f2l_vllm.video.sample import Sampling


@dataclass(frozen=True)
class Forecast:
    """The time of a run's steps in one process, without validations and without what processes tell each other.

    Attributes:
        steps: of the run.
        operations: floating-point operations of this process in a step, on average.
        rate: operations a second, measured with one video, forward and backward.
        decoding: seconds that one process decodes and samples a step's videos.
        workers: processes that decode; 0 if this one does.
    """

    steps: int
    operations: float
    rate: float
    decoding: float
    workers: int

    @property
    def step_seconds(self) -> float:
        """Of a step; workers decode while the device computes."""
        computing = self.operations / self.rate
        return max(computing, self.decoding / self.workers) if self.workers else computing + self.decoding

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.steps * self.step_seconds


def forecast(trainer: Trainer, examples: Sequence[Example], options: TrainingOptions, workers: int) -> Forecast:
    """Compute the first video twice, which changes nothing, and time the second.

    All numbers of frames and chunks that steps draw from are counted alike.

    Raises:
        ValueError: as `Lessons`.
    """
    config = trainer.hyper.config
    parts = trainer.loop.processes * options.accumulate
    videos = max(1, options.videos // parts) * options.accumulate
    operations, decoding = [], []
    for frames, chunks in product(sorted(options.frames) or (None,), sorted(options.chunks)):
        lessons = Lessons(
            examples,
            trainer.processor,
            sampling=Sampling(config.max_frames, longest_edge=config.longest_edge),
            frames=() if frames is None else (frames,),
            chunks=(chunks,),
            questions=options.questions,
        )
        chosen = Randomness.of("forecast", 0)
        started = time.perf_counter()
        taken = lessons.take(0, 1, chosen.shared, chosen.rng)
        decoding.append(time.perf_counter() - started)
        part = trainer.part(taken)
        teacher, recompute = options.kl > 0, options.recompute
        operations.append(work_of(trainer.model, config, part, teacher=teacher, recompute=recompute).total)
    seconds = min(_seconds(trainer, taken, options) for _ in range(2))  # the first is slower: it prepares the device
    return Forecast(
        steps=options.steps_of(len(lessons)),
        operations=videos * fmean(operations),
        rate=operations[-1] / seconds,
        decoding=videos * fmean(decoding),
        workers=workers,
    )


def _seconds(trainer: Trainer, lessons: Sequence[Lesson], options: TrainingOptions) -> float:
    """Of the loss of a part and its gradients, which are dropped."""
    device = trainer.loop.device
    started = time.perf_counter()
    trainer.loss(lessons, options).mean.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    trainer.hyper.zero_grad()
    return time.perf_counter() - started
