"""What one training step teaches, drawn from manifests: videos, cut into chunks, and the questions about them.

Examples about one video (or one span of it) are asked together. The seed shuffles each epoch, and each process takes
its own videos. A video that cannot be used is reported, and another one takes its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch.utils.data import get_worker_info

from f2l_vllm.train.conversations import Asked
from f2l_vllm.train.data.clips import UnusableVideoError, open_example
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.video.sample import SampledVideo, Sampling

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lesson:
    """One video and what is asked about it.

    Attributes:
        whole: all sampled frames, as the teacher sees them.
        pieces: how many chunks they are cut into.
        asked: (question, answer, kind).
    """

    whole: SampledVideo
    pieces: int
    asked: list[Asked]

    @property
    def chunks(self) -> list[SampledVideo]:
        """The frames in consecutive pieces, one adapter each."""
        return cut(self.whole, self.pieces)


class Lessons:
    """Draws lessons from examples.

    Args:
        examples: with answers.
        processor: samples the frames.
        sampling: how the hypernetwork reads videos; `frames` replaces its number of frames.
        frames: numbers of frames to choose from, per step; empty keeps the sampling's.
        chunks: numbers of chunks to choose from, per step.
        questions: limit of questions about one video in a step.
        seed: determines the order and all choices.

    Raises:
        ValueError: no example, or one without an answer.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Any,
        *,
        sampling: Sampling,
        frames: Sequence[int] = (),
        chunks: Sequence[int] = (1,),
        questions: int = 8,
        seed: int = 0,
    ) -> None:
        unanswered = [example.id for example in examples if not example.target_text.strip()]
        if unanswered:
            raise ValueError(
                f"{len(unanswered)} examples have no target_text (the first is {unanswered[0]!r}); let the model write "
                "them with 'f2l-vllm targets'."
            )
        self._videos: dict[tuple[str, tuple[float, float] | None], list[Example]] = {}
        for example in examples:
            self._videos.setdefault((str(example.video_path), example.span), []).append(example)
        if not self._videos:
            raise ValueError("The manifest holds no example to train on.")
        self._keys = sorted(self._videos, key=str)
        self._paths = {str(key): key[0] for key in self._keys}
        self._processor, self._sampling = processor, sampling
        self._frames, self._chunks, self._questions, self._seed = frames, chunks, questions, seed
        self.unusable: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of videos (and spans) in an epoch."""
        return len(self._keys)

    def digest(self) -> str:
        """16 hex digits that change with any video's name, span, question or answer, and with their order.

        They stay the same when the folder that holds all the videos moves.
        """
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path, _ in self._videos])
        taught = [
            [
                os.path.relpath(path, folder),
                span,
                [(example.prompt, example.target_text, example.task_type) for example in examples],
            ]
            for (path, span), examples in self._videos.items()
        ]
        return hashlib.sha256(json.dumps(taught).encode()).hexdigest()[:16]

    def leave_out(self, unusable: Mapping[str, str]) -> None:
        """Enter videos (and spans) that cannot be used, with the reasons."""
        for key, reason in unusable.items():
            if key not in self.unusable:
                self.unusable[key] = reason
                if get_worker_info() is None:  # it is told where the lesson is taken
                    _log.warning("%s is left out: %s", self._paths.get(key, key), reason)

    def take(self, first: int, count: int, shared: random.Random, rng: random.Random) -> list[Lesson]:
        """Lessons number `first` to `first + count` of the endless sequence of epochs.

        Args:
            shared: chooses the numbers of frames and chunks; the same in every process.
            rng: chooses the questions.

        Raises:
            ValueError: no video of the manifest can be used.
        """
        frames = shared.choice(list(self._frames)) if self._frames else None
        count_chunks = shared.choice(list(self._chunks))
        sampling = Sampling(max_frames=frames).or_else(self._sampling)
        opened = [self._open(number, sampling) for number in range(first, first + count)]
        count_chunks = min(count_chunks, min(len(sampled.frames) for _, sampled in opened))
        lessons = []
        for key, sampled in opened:
            examples = self._videos[key]
            chosen = rng.sample(examples, min(self._questions, len(examples)))
            asked = [(example.prompt, example.target_text, example.task_type) for example in chosen]
            lessons.append(Lesson(sampled, count_chunks, asked))
        return lessons

    def _open(self, number: int, sampling: Sampling) -> tuple[tuple[str, tuple[float, float] | None], SampledVideo]:
        for key in self._from(number):
            if str(key) in self.unusable:
                continue
            try:
                return key, open_example(self._videos[key][0], self._processor, sampling)
            except UnusableVideoError as error:
                self.leave_out({str(key): str(error)})
        raise ValueError(f"None of the {len(self)} videos can be used; the first: {next(iter(self.unusable.values()))}")

    def _from(self, number: int) -> Iterator[tuple[str, tuple[float, float] | None]]:
        """The video at this place of the endless sequence, then all others of its epoch in case it is unusable."""
        epoch, place = divmod(number, len(self))
        order = list(self._keys)
        random.Random(f"epoch:{self._seed}:{epoch}").shuffle(order)
        yield from order[place:]
        yield from order[:place]


def cut(sampled: SampledVideo, count: int) -> list[SampledVideo]:
    """The frames of a sampled video in `count` consecutive pieces of about equal length, with their own times."""
    total = len(sampled.frames)
    edges = [round(total * index / count) for index in range(count + 1)]
    indices = list(sampled.metadata.frames_indices or ())
    return [
        replace(
            sampled,
            frames=sampled.frames[start:end],
            metadata=replace(sampled.metadata, frames_indices=indices[start:end]),
        )
        for start, end in pairwise(edges)
    ]
