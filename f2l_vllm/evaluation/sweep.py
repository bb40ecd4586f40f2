"""A sweep over frames and resolution: what adapter and frames in context score and cost at each.

Every figure comes from the way the setup names. Through the server, one is started for each number of frames, which it
reads in both arms, and asked one question at a time, so that a time to the first token is no other question's wait.
Through transformers no such time is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from f2l_vllm.evaluation.answers import ANSWERS_FILE, Answer, read_answers
from f2l_vllm.evaluation.percentiles import percentiles
from f2l_vllm.evaluation.questions import ADAPTER, FRAMES, QuestionSet
from f2l_vllm.evaluation.run import Progress, evaluate
from f2l_vllm.evaluation.scores import Scores
from f2l_vllm.evaluation.setup import Setup

ARMS_SWEPT = (ADAPTER, FRAMES)


@dataclass(frozen=True)
class Grid:
    """What is swept. `frames`: read of a video at most; `resolutions`: the longest edge of its file, pixels.

    Raises:
        ValueError: an empty axis, a repeated value, or one that is no count.
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
        work: keeps the answers of every number of frames in a folder of its own, to resume from.

    Returns:
        as JSON: `metric`, `rows`, one per number of frames, resolution and arm, and `skipped`, what could not be asked.
        A row has `frames, resolution, arm, score, ci95, n, videos, ttft_ms, prompt_tokens, visual_tokens, through`.
        `ttft_ms` (None without a server) has `first`, the first question about a video in an arm, and `later`, those
        for which the server has the prompt's beginning cached; each with `median`, `n` and, of ten or more, `p90`.

    Raises:
        ValueError: a running server, whose number of frames is fixed; else as `evaluate`.
    """
    if setup.base_url is not None:
        raise ValueError("a sweep starts a server for each number of frames: leave out the running server's address")
    rows, skipped = [], []
    for count in grid.frames:
        report = _prefixed(on_progress, f"{count} frames: ")
        folder = work / f"{count}-frames"
        at_count = replace(
            setup, arms=ARMS_SWEPT, max_frames=count, concurrency=1, composition=False, judge=None, metric=None
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


def _figures(summary: dict[str, Any], answers: Iterable[Answer], arm: str) -> dict[str, Any]:
    kept = {name: summary[name] for name in ("score", "ci95", "n", "videos")}
    return {
        **kept,
        "ttft_ms": _first_token(answer for answer in answers if answer.arm == arm),
        "prompt_tokens": summary["cost"]["prompt_tokens"],
        "visual_tokens": summary["cost"]["visual_tokens"],
    }


def _first_token(answers: Iterable[Answer]) -> dict[str, Any] | None:
    """Times of an arm's answers in the order they were given."""
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
