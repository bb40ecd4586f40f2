"""Accuracy over cost: every way to answer about the same videos, with its score, its prompt's tokens and first token.

All in this process, one question at a time, and the ways take turns at every video: nothing but the way differs. The
times compare ways on one machine; a server's are measured by `f2l-vllm bench`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from f2l_vllm.evaluation.answers import AnswerLog, AnswerRecord
from f2l_vllm.evaluation.in_process import TransformersAnswers
from f2l_vllm.evaluation.questions import ADAPTER, CACHED, EVS, FRAMES, V2DROP, Ask, Clip, QuestionSet, Skipped
from f2l_vllm.evaluation.run import Progress, identity_of
from f2l_vllm.evaluation.scores import Scores
from f2l_vllm.evaluation.setup import TRANSFORMERS, Setup

WHOLE = {name: name for name in (FRAMES, EVS, V2DROP, CACHED, ADAPTER)}  # name here -> arm that answers
MERGED = {"frames-merged": FRAMES, "adapter-merged": ADAPTER}
WAYS = {**WHOLE, **MERGED}


def efficiency(questions: QuestionSet, setup: Setup, work: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """Ask every question in every way.

    Args:
        setup: `keep_rate` is the part of the visual tokens that is left where some are dropped or merged.
        work: folder for answers, to resume from.

    Returns:
        as JSON: `metric`, `keep_rate`, `rows`, one per way: `arm, score, ci95, n, videos, prompt_tokens, visual_tokens,
        ttft_ms {median, n}`, and `skipped`.

    Raises:
        ValueError: nothing is left where all is kept, or `work` holds answers of another configuration.
    """
    if setup.keep_rate == 1:
        raise ValueError("with a keep rate of 1 nothing is dropped or merged: give --keep-rate below 1")
    alone: dict[str, Any] = {
        "through": TRANSFORMERS,
        "base_url": None,
        "serve_flags": "",
        "composition": (),
        "merge_rate": 0.0,
    }
    setup = replace(setup, arms=(FRAMES, EVS, V2DROP, ADAPTER), **alone)
    report = on_progress or (lambda stage, done, total: None)
    skipped: list[Skipped] = []
    total = len(WAYS) * sum(len(clip.questions) for clip in questions.clips)
    with AnswerLog(work, identity_of(questions, setup) | {"one_by_one": True}) as log:
        report("efficiency", len(log.answers), total)
        left = [ask for ask in _asks(questions) if (ask.arm, ask.question.id) not in log.answers]
        answers = _Ways(setup) if left else None
        for clip, name in _turns(questions):
            some = [ask for ask in left if (ask.clip.id, ask.arm) == (clip.id, name)]
            if answers is not None and some:
                skipped += answers.answer(name, some, log)
                report("efficiency", len(log.answers), total)
        everything = list(log.answers.values())
    scores = Scores(everything, questions.metric, apart=questions.apart)
    rows = [_row(name, scores, everything) for name in WAYS]
    return {
        "metric": questions.metric,
        "keep_rate": setup.keep_rate,
        "rows": rows,
        "skipped": [asdict(one) for one in skipped],
    }


class _Ways:
    """One model that answers in every way; each is asked once before it counts, for the first time takes longer."""

    def __init__(self, setup: Setup) -> None:
        self._merge_rate = 1 - setup.keep_rate
        self._warm: set[str] = set()
        self._answers = TransformersAnswers(
            setup.model,
            setup.hypernetwork,
            setup.reading,
            max_tokens=setup.max_tokens,
            keep_rate=setup.keep_rate,
            one_by_one=True,
        )

    def answer(self, name: str, asks: list[Ask], log: AnswerLog) -> list[Skipped]:
        """Answer questions about one video; returns what could not be asked."""
        skipped: list[Skipped] = []
        self._answers.internalizer.encoder.merge_rate = self._merge_rate if name in MERGED else 0.0
        some = [replace(ask, arm=WAYS[name]) for ask in asks]
        if name not in self._warm:
            self._answers.answer(some[:1], lambda ask, reply: None, lambda one: None)
            self._warm.add(name)
        self._answers.answer(
            some,
            lambda ask, reply: log.append(AnswerRecord.of(replace(ask, arm=name), reply)),
            lambda one: skipped.append(replace(one, arm=name)),
        )
        return skipped


def _asks(questions: QuestionSet) -> list[Ask]:
    return [Ask(clip, question, name, clip) for name in WAYS for clip in questions.clips for question in clip.questions]


def _turns(questions: QuestionSet) -> list[tuple[Clip, str]]:
    """The ways take turns at every video, with another one first each time."""
    names = list(WAYS)
    return [
        (clip, name)
        for number, clip in enumerate(questions.clips)
        for name in names[number % len(names) :] + names[: number % len(names)]
    ]


def _row(name: str, scores: Scores, answers: list[AnswerRecord]) -> dict[str, Any]:
    found = scores.arm(name)
    times = [answer.ttft_ms for answer in answers if answer.arm == name and answer.ttft_ms is not None]
    return {
        "arm": name,
        **{key: found[key] for key in ("score", "ci95", "n", "videos")},
        "prompt_tokens": found["cost"]["prompt_tokens"],
        "visual_tokens": found["cost"]["visual_tokens"],
        "ttft_ms": {"median": round(float(np.median(times)), 2), "n": len(times)} if times else None,
    }
