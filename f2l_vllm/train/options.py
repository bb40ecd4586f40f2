"""What a hypernetwork's training is asked to do, and the checks of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

WEIGHED = ("tokens", "answers")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingOptions:
    """How long a hypernetwork is trained, and on what; the defaults are the paper's.

    Attributes:
        epochs: passes over the manifest's videos; ignored when `steps` is given.
        steps: optimizer steps.
        videos: per step, over all processes and accumulated parts; a multiple of their product.
        accumulate: parts a process computes one after the other in a step.
        questions: limit of questions about a video in one step.
        learning_rate: of AdamW; with `muon_rate` it trains only what is not a matrix.
        muon_rate: learning rate of Muon for the matrices; None for AdamW alone.
        ce: weight of the cross-entropy of the answers; 0 leaves the divergence alone.
        kl: weight of the divergence from the teacher with the frames in its context.
        temperature: divides the logits of both in the divergence, which is multiplied by its square.
        weigh: what counts alike in a step's means, every token of its answers or every answer: one of `WEIGHED`.
        frames: numbers of frames to mix; the largest becomes the hypernetwork's own. Empty: its own alone.
        chunks: numbers of chunks to mix.
        precision: of the computation; weights and optimizer stay in fp32.
        recompute: the backward pass computes the Perceiver again, a text layer at a time, in place of keeping it.
        validate_every: steps between two validations, the best of which is kept; None validates before and after.

    Raises:
        ValueError: a value that cannot be used; the message says which.
    """

    epochs: float = 1.0
    steps: int | None = None
    videos: int = 8
    accumulate: int = 1
    questions: int = 8
    learning_rate: float = 1e-4
    muon_rate: float | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    ce: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0
    weigh: str = "tokens"
    frames: tuple[int, ...] = ()
    chunks: tuple[int, ...] = (1,)
    precision: str = "fp32"
    recompute: bool = False
    validate_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "videos", "accumulate", "questions", "learning_rate", "clip", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}.")
        for name in ("steps", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value!r}.")
        for name in ("ce", "kl"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is the weight of a loss and cannot be negative, got {getattr(self, name)!r}.")
        if not self.ce and not self.kl:
            raise ValueError("ce and kl are both 0, so there is no loss: give one of them a weight.")
        if self.weigh not in WEIGHED:
            raise ValueError(f"weigh is one of {', '.join(WEIGHED)}, got {self.weigh!r}.")
        if not self.chunks or min((*self.chunks, *self.frames)) < 1:
            raise ValueError("frames and chunks are numbers of frames and chunks: give positive ones.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {self.precision!r}.")

    def steps_of(self, videos: int) -> int:
        """How many steps a run over so many videos takes."""
        return self.steps or max(1, math.ceil(self.epochs * videos / self.videos))
