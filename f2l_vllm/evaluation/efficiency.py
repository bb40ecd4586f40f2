"""Accuracy over cost: every way to answer about the same videos, with its score, its prompt's tokens and first token.

All in this process, one question at a time, so that nothing but the way differs. The times compare ways on one machine;
a server's are measured by `f2l-vllm bench`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from f2l_vllm.evaluation.answers import AnswerLog, AnswerRecord
from f2l_vllm.evaluation.in_process import TransformersAnswers
from f2l_vllm.evaluation.questions import ADAPTER, CACHED, EVS, FRAMES, V2DROP, Ask, QuestionSet, Reply, Skipped
from f2l_vllm.evaluation.run import Progress, identity_of
from f2l_vllm.evaluation.scores import Scores
from f2l_vllm.evaluation.setup import TRANSFORMERS, Setup

WHOLE = {name: name for name in (FRAMES, EVS, V2DROP, CACHED, ADAPTER)}  # name here -> arm that answers
MERGED = {"frames-merged": FRAMES, "adapter-merged": ADAPTER}
WAYS = (*WHOLE, *MERGED)


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
    done, total = 0, len(WAYS) * sum(len(clip.questions) for clip in questions.clips)
    with AnswerLog(work, identity_of(questions, setup) | {"one_by_one": True}) as log:
        for ways, rate in ((WHOLE, 0.0), (MERGED, 1 - setup.keep_rate)):
            left = [ask for ask in _asks(questions, ways) if (ask.arm, ask.question.id) not in log.answers]
            done += len(ways) * total // len(WAYS) - len(left)
            report("efficiency", done, total)
            if not left:
                continue
            reading = replace(setup.reading, merge_rate=rate)
            answers = TransformersAnswers(
                setup.model,
                setup.hypernetwork,
                reading,
                max_tokens=setup.max_tokens,
                keep_rate=setup.keep_rate,
                one_by_one=True,
            )
            for name, arm in ways.items():
                some = [replace(ask, arm=arm) for ask in left if ask.arm == name]

                def on_reply(ask: Ask, reply: Reply, name: str = name) -> None:
                    nonlocal done
                    log.append(AnswerRecord.of(replace(ask, arm=name), reply))
                    done += 1
                    report("efficiency", done, total)

                def on_skip(one: Skipped, name: str = name) -> None:
                    skipped.append(replace(one, arm=name))

                answers.answer(some[:1], lambda ask, reply: None, lambda one: None)  # the first takes longer
                answers.answer(some, on_reply, on_skip)
        everything = list(log.answers.values())
    scores = Scores(everything, questions.metric, apart=questions.apart)
    rows = [_row(name, scores, everything) for name in WAYS]
    return {
        "metric": questions.metric,
        "keep_rate": setup.keep_rate,
        "rows": rows,
        "skipped": [asdict(one) for one in skipped],
    }


def _asks(questions: QuestionSet, ways: dict[str, str]) -> list[Ask]:
    return [Ask(clip, question, name, clip) for name in ways for clip in questions.clips for question in clip.questions]


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
