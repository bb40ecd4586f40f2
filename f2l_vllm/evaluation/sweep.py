"""A sweep over frames and resolution: the scores and costs of the adapter and of the frames in context at each.

Answers come from the server or from transformers, as the setup says. For each number of frames a server is started that
reads that number in both arms. It is asked one question at a time, so that no time to the first token includes waiting
for another question. With transformers that time is not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from f2l_vllm.evaluation.answers import ANSWERS_FILE, AnswerRecord, read_answers
from f2l_vllm.evaluation.percentiles import percentiles
from f2l_vllm.evaluation.questions import ADAPTER, FRAMES, QuestionSet
from f2l_vllm.evaluation.run import Progress, evaluate
from f2l_vllm.evaluation.scores import Scores
from f2l_vllm.evaluation.setup import Setup

ARMS_SWEPT = (ADAPTER, FRAMES)


@dataclass(frozen=True)
class Grid:
    """The axes of a sweep. `frames`: most frames read of a video; `resolutions`: longest edges of its file, in pixels.

    Raises:
        ValueError: an empty axis, a repeated value, or a value that is too small.
    """

    frames: tuple[int, ...] = (4, 8, 16, 32, 64)
    resolutions: tuple[int, ...] = (160, 320, 640)

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("resolutions", 2)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < least:
                raise ValueError(f"a sweep's {name} are different whole numbers from {least} up, not {values}")


def sweep(
    questions: QuestionSet,
    edge_of: dict[str, int],
    setup: Setup,
    grid: Grid,
    work: Path,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask all questions at every number of frames.

    Args:
        questions: at every resolution, as `footage.at_resolutions` makes them, with `edge_of`.
        work: folder with a subfolder of answers for each number of frames, to resume from.

    Returns:
        as JSON: `metric`, `rows`, one per number of frames, resolution and arm, and `skipped`, what could not be asked.
        A row has `frames, resolution, arm, score, ci95, n, videos, ttft_ms, prompt_tokens, visual_tokens, through`.
        `ttft_ms` (None without a server) has `first`, for first questions about a video in an arm, and `later`, for
        those whose prompt's beginning the server has cached; each with `median`, `n` and, of ten or more, `p90`.

    Raises:
        ValueError: the setup names a running server, whose number of frames is fixed; else as `evaluate`.
    """
    if setup.base_url is not None:
        raise ValueError("a sweep starts a server for each number of frames: leave out the running server's address")
    rows, skipped = [], []
    for count in grid.frames:
        report = _prefixed(on_progress, f"{count} frames: ")
        folder = work / f"{count}-frames"
        at_count = replace(
            setup, arms=ARMS_SWEPT, max_frames=count, concurrency=1, composition=(), judge=None, metric=None
        )
        found = evaluate(questions, at_count, folder, report)
        skipped += [{"frames": count, **one} for one in found["skipped"]]
        answers = read_answers(folder / ANSWERS_FILE)
        for edge in grid.resolutions:
            some = [answer for answer in answers if edge_of.get(answer.id) == edge]
            scores = Scores(some, questions.metric, apart=questions.apart)
            rows += [
                {"frames": count, "resolution": edge, "arm": arm, **_figures(scores.arm(arm), some, arm)}
                | {"through": setup.through}
                for arm in ARMS_SWEPT
            ]
    return {"metric": questions.metric, "rows": rows, "skipped": skipped}


def _figures(summary: dict[str, Any], answers: Iterable[AnswerRecord], arm: str) -> dict[str, Any]:
    kept = {name: summary[name] for name in ("score", "ci95", "n", "videos")}
    return {
        **kept,
        "ttft_ms": _first_token(answer for answer in answers if answer.arm == arm),
        "prompt_tokens": summary["cost"]["prompt_tokens"],
        "visual_tokens": summary["cost"]["visual_tokens"],
    }


def _first_token(answers: Iterable[AnswerRecord]) -> dict[str, Any] | None:
    """Times to the first token of an arm's answers, which are given in the order of their arrival."""
    first: list[float] = []
    later: list[float] = []
    seen: set[str] = set()
    for answer in answers:
        if answer.ttft_ms is None:
            return None
        (later if answer.video in seen else first).append(answer.ttft_ms)
        seen.add(answer.video)
    return {name: _spread(times) for name, times in (("first", first), ("later", later)) if times} or None


def _spread(times: list[float]) -> dict[str, Any]:
    high = {name: round(value, 2) for name, value in percentiles(times, (90,)).items()}
    return {"median": round(float(np.median(times)), 2), **high, "n": len(times)}


def _prefixed(on_progress: Progress | None, prefix: str) -> Callable[[str, int, int], None] | None:
    if on_progress is None:
        return None
    return lambda stage, done, total: on_progress(prefix + stage, done, total)
