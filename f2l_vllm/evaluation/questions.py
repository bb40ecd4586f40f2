"""Videos, the questions about each with their true answers, and the ways (arms) of answering them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ADAPTER, FRAMES, NONE, WRONG_VIDEO = ARMS = ("adapter", "frames", "none", "wrong-video")
EVS, V2DROP = DROPPING_ARMS = ("frames-evs", "frames-v2drop")  # the frames in context, with fewer tokens
CACHED = "frames-cached"  # the frames in context, whose keys and values are kept from a question before
CHUNKS = (1, 2, 4)


@dataclass(frozen=True)
class Question:
    """One question about one video.

    Attributes:
        id: unique in its set.
        truth: the answer that scores full marks.
        type: kind of question; scores are means over types.
        dataset: where it comes from.
    """

    id: str
    text: str
    truth: str
    type: str
    dataset: str


@dataclass(frozen=True)
class Clip:
    """A video file and what is asked about it.

    Attributes:
        id: how answers name the video: its path, relative to the working folder if it lies inside.
        path: the file to watch.
        source: the file it was cut from, or the file itself, named like `id`. Clips of one file are not independent.
    """

    id: str
    path: Path
    source: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Skipped:
    """Something that was left out of the scores, and why. `arm` is None when nothing was asked about the video."""

    video: str
    reason: str
    arm: str | None = None


@dataclass(frozen=True)
class QuestionSet:
    """Clips with their questions.

    Attributes:
        identity: what determines the questions and videos, as JSON; equal identities mean equal questions.
        metric: the main metric of the scores: `exact_match` or `f1`.
        apart: types that are left out of the overall score and reported on their own.
        skipped: examples that could not be used.
    """

    identity: dict[str, Any]
    clips: tuple[Clip, ...]
    metric: str
    apart: frozenset[str] = frozenset()
    skipped: tuple[Skipped, ...] = field(default=())


@dataclass(frozen=True)
class Ask:
    """One question in one arm. `reads`: the clip whose adapter or frames the answer comes from; None for neither."""

    clip: Clip
    question: Question
    arm: str
    reads: Clip | None


@dataclass(frozen=True)
class Reply:
    """An answer, and what it cost.

    Attributes:
        visual_tokens: of the prompt; None if they cannot be counted.
        ttft_ms: from sending the question to the answer's first token; None if answers are not streamed.
        seconds: from sending the question to the end of the answer.
    """

    text: str
    prompt_tokens: int
    visual_tokens: int | None
    ttft_ms: float | None
    seconds: float


def chunk_arm(count: int) -> str:
    """The arm that answers under the adapter of the video in `count` chunks: `1 chunk`, `2 chunks`."""
    return f"{count} chunk{'s' * (count > 1)}"


def chunks_of(arm: str) -> int | None:
    """The number of chunks in which an arm internalizes the video; None: the arm is no `chunk_arm`."""
    count = re.fullmatch(r"([1-9]\d*) chunks?", arm)
    return None if count is None or chunk_arm(int(count[1])) != arm else int(count[1])


def plan(clips: Sequence[Clip], arms: Sequence[str]) -> list[Ask]:
    """Every question in every arm, video by video.

    Raises:
        ValueError: an unknown arm, or `wrong-video` with a single video.
    """
    for arm in arms:
        if arm not in (*ARMS, *DROPPING_ARMS) and chunks_of(arm) is None:
            raise ValueError(f"unknown arm {arm!r}: choose from {', '.join((*ARMS, *DROPPING_ARMS))}")
    asks = []
    for index, clip in enumerate(clips):
        for arm in arms:
            reads = _other(clips, index) if arm == WRONG_VIDEO else None if arm == NONE else clip
            asks += [Ask(clip, question, arm, reads) for question in clip.questions]
    return asks


def by_video_read(asks: Sequence[Ask]) -> list[tuple[Clip, list[Ask]]]:
    """The asks grouped by the clip to watch for them, so that each clip is watched once."""
    groups: dict[str, tuple[Clip, list[Ask]]] = {}
    for ask in asks:
        clip = ask.reads or ask.clip
        groups.setdefault(clip.id, (clip, []))[1].append(ask)
    return list(groups.values())


def _other(clips: Sequence[Clip], index: int) -> Clip:
    """The next clip of another video; after the last clip comes the first."""
    for step in range(1, len(clips)):
        other = clips[(index + step) % len(clips)]
        if other.source != clips[index].source:
            return other
    raise ValueError("the arm wrong-video needs at least two different videos: ask about more, or leave it out")
