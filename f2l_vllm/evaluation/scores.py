"""From answers to figures: each arm's scores, the arms compared, and how pieces of a video compose.

A score is the macro mean over question types: every type weighs the same. It is computed as the mean of one value per
video, so that intervals and tests take the video as their unit. Spans of one file are one video.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from f2l_vllm.evaluation import statistics
from f2l_vllm.evaluation.answers import AnswerRecord
from f2l_vllm.evaluation.questions import ADAPTER, CHUNKS, FRAMES, chunk_arm
from f2l_vllm.evaluation.statistics import Estimate, Values

EXACT_MATCH, F1, JUDGE = METRICS = ("exact_match", "f1", "judge")
# A difference up to the margin would not matter. Those of F1 and the judge are from section 4.3 of Frames2LoRA (arXiv
# 2606.04351), where the judge's is 0.15 of its score over 5.
MARGINS = {EXACT_MATCH: 0.05, F1: 0.05, JUDGE: 0.75}
_DIGITS = 4


def measure(answer: AnswerRecord, metric: str) -> float | None:
    """An answer's score by a metric; None if the judge gave none."""
    value: float | None = getattr(answer, metric)
    return None if value is None else float(value)


def macro_values(scores: Iterable[tuple[str, str, float]]) -> Values:
    """One value per video, in the order of the videos' names, whose mean is the macro mean over types.

    If every video has the same number of questions of every type, a video's value is the mean over its questions.
    Otherwise each type's mean is a ratio of sums, and the value is the video's part in these ratios, to first order.

    Args:
        scores: (video, type, score) of every question.
    """
    rows = list(scores)
    videos = {name: index for index, name in enumerate(sorted({video for video, _, _ in rows}))}
    types = {name: index for index, name in enumerate(sorted({kind for _, kind, _ in rows}))}
    sums_VT, counts_VT = np.zeros((len(videos), len(types))), np.zeros((len(videos), len(types)))
    for video, kind, score in rows:
        sums_VT[videos[video], types[kind]] += score
        counts_VT[videos[video], types[kind]] += 1
    total_T = counts_VT.sum(0)
    mean_T = sums_VT.sum(0) / total_T
    parts_VT = len(videos) * (sums_VT - mean_T * counts_VT) / total_T
    values: Values = mean_T.mean() + parts_VT.mean(1)
    return values


class Scores:
    """The answers of one evaluation.

    Args:
        answers: of all arms.
        metric: the main metric of scores and comparisons.
        apart: types left out of the overall scores.
        non_inferiority_margins, equivalence_margins: by metric.
    """

    def __init__(
        self,
        answers: Iterable[AnswerRecord],
        metric: str,
        *,
        apart: frozenset[str] = frozenset(),
        non_inferiority_margins: dict[str, float] = MARGINS,
        equivalence_margins: dict[str, float] = MARGINS,
    ) -> None:
        self._all: dict[str, list[AnswerRecord]] = {}
        for answer in answers:
            self._all.setdefault(answer.arm, []).append(answer)
        self._scored = {arm: [a for a in some if a.type not in apart] for arm, some in self._all.items()}
        self._apart = apart
        self._non_inferiority_margins, self._equivalence_margins = non_inferiority_margins, equivalence_margins
        everything = [answer for some in self._all.values() for answer in some]
        self.metric = metric
        self.metrics = [m for m in METRICS if any(measure(answer, m) is not None for answer in everything)]
        self._several_datasets = len({answer.dataset for answer in everything}) > 1

    def arm(self, arm: str) -> dict[str, Any]:
        """An arm's scores and costs, as JSON."""
        answers = self._scored.get(arm, [])
        summary: dict[str, Any] = {
            "metric": self.metric,
            **self._estimate(answers, self.metric),
            "n": len(answers),
            "videos": len({answer.source for answer in answers}),
            "by_type": {kind: self._mean(some, self.metric) for kind, some in self._by_type(answers).items()},
            **{metric: self._mean(answers, metric) for metric in self.metrics},
        }
        for kind in sorted(self._apart):
            some = [answer for answer in self._all.get(arm, []) if answer.type == kind]
            if some:
                summary[kind] = {**self._estimate(some, self.metric), "n": len(some)}
                summary[kind] |= {metric: self._mean(some, metric) for metric in self.metrics}
        if JUDGE in self.metrics:
            summary["unjudged"] = sum(answer.judge is None for answer in self._all.get(arm, []))
        return summary | {"cost": _cost(answers)}

    def comparison(self, arm: str, other: str) -> dict[str, Any]:
        """`arm` minus `other` on the questions that both answered, by every metric, as JSON."""
        ours, theirs = self._scored.get(arm, []), self._scored.get(other, [])
        others = {metric: self._compare(ours, theirs, metric) for metric in self.metrics if metric != self.metric}
        return {"metric": self.metric, **self._compare(ours, theirs, self.metric), "other_metrics": others}

    def composition(self, chunks: Sequence[int] = CHUNKS) -> dict[str, Any]:
        """The video in these numbers of chunks, and the ratio to the first number's score, as JSON."""
        table: dict[str, Any] = {}
        single, *_ = arms = [chunk_arm(count) for count in chunks]
        for arm in arms:
            table[arm] = self.arm(arm)
            del table[arm]["cost"]
            table[arm]["ratio"] = self._ratio(arm, single, self.metric)
            table[arm]["f1_ratio"] = self._ratio(arm, single, F1)
        return table

    def rows(self, arms: Sequence[str]) -> list[dict[str, Any]]:
        """The table: all types together, each type, the types apart. A row has every arm's score and, if both arms are
        there, the comparison of the adapter with the frames.
        """
        rows = [self._row("mean over types", {arm: self._scored.get(arm, []) for arm in arms})]
        by_type = {arm: self._by_type(self._all.get(arm, [])) for arm in arms}
        groups = dict.fromkeys(group for some in by_type.values() for group in some)
        for group in groups:
            answers = {arm: some.get(group, []) for arm, some in by_type.items()}
            kind = next(answer.type for some in answers.values() for answer in some)
            rows.append(self._row(kind, answers) | {"apart": kind in self._apart})
        return sorted(rows, key=lambda row: row.get("apart", False))

    def _row(self, kind: str, answers: dict[str, list[AnswerRecord]]) -> dict[str, Any]:
        everything = [answer for some in answers.values() for answer in some]
        row: dict[str, Any] = {
            "dataset": ", ".join(sorted({answer.dataset for answer in everything})),
            "type": kind,
            "n": len({answer.id for answer in everything}),
            "videos": len({answer.source for answer in everything}),
            "arms": {arm: self._estimate(some, self.metric) for arm, some in answers.items()},
        }
        if ADAPTER in answers and FRAMES in answers:
            row["comparison"] = self._compare(answers[ADAPTER], answers[FRAMES], self.metric)
        return row

    def _group(self, answer: AnswerRecord) -> str:
        return f"{answer.dataset}/{answer.type}" if self._several_datasets else answer.type

    def _by_type(self, answers: Iterable[AnswerRecord]) -> dict[str, list[AnswerRecord]]:
        groups: dict[str, list[AnswerRecord]] = {}
        for answer in answers:
            groups.setdefault(self._group(answer), []).append(answer)
        return groups

    def _values(self, answers: Iterable[AnswerRecord], metric: str) -> Values | None:
        rows = [(a.source, self._group(a), score) for a in answers if (score := measure(a, metric)) is not None]
        return macro_values(rows) if rows else None

    def _mean(self, answers: Iterable[AnswerRecord], metric: str) -> float | None:
        values = self._values(answers, metric)
        return None if values is None else _rounded(values.mean())

    def _estimate(self, answers: Iterable[AnswerRecord], metric: str) -> dict[str, Any]:
        values = self._values(answers, metric)
        return {"score": None, "ci95": None} if values is None else _as_json("score", statistics.mean(values))

    def _compare(self, ours: Iterable[AnswerRecord], theirs: Iterable[AnswerRecord], metric: str) -> dict[str, Any]:
        reference = {answer.id: measure(answer, metric) for answer in theirs}
        differences = [
            (answer.source, self._group(answer), score - other)
            for answer in ours
            if (score := measure(answer, metric)) is not None and (other := reference.get(answer.id)) is not None
        ]
        if not differences:
            return {"difference": None, "ci95": None, "note": "no question was scored in both arms"}
        values = macro_values(differences)
        return {
            **_as_json("difference", statistics.mean(values)),
            "n": len(differences),
            "videos": len(values),
            "non_inferior": statistics.non_inferiority(values, self._non_inferiority_margins[metric]).as_json(),
            "equivalent": statistics.equivalence(values, self._equivalence_margins[metric]).as_json(),
        }

    def _ratio(self, arm: str, other: str, metric: str) -> dict[str, Any] | None:
        """The ratio of two arms' scores on the questions that both answered; None if the other scores nothing."""
        ours, theirs = self._scored.get(arm, []), self._scored.get(other, [])
        common = {answer.id for answer in ours} & {answer.id for answer in theirs}
        values = self._values((answer for answer in ours if answer.id in common), metric)
        reference = self._values((answer for answer in theirs if answer.id in common), metric)
        if values is None or reference is None or not reference.mean() > 0:
            return None
        return _as_json("value", statistics.ratio(values, reference))


def _cost(answers: Sequence[AnswerRecord]) -> dict[str, float | None]:
    """Mean tokens of a prompt, and median times; None for what was not counted."""
    visual = [answer.visual_tokens for answer in answers if answer.visual_tokens is not None]
    ttft = [answer.ttft_ms for answer in answers if answer.ttft_ms is not None]
    return {
        "prompt_tokens": _rounded(fmean(answer.prompt_tokens for answer in answers)) if answers else None,
        "visual_tokens": _rounded(fmean(visual)) if visual else None,
        "ttft_ms": _rounded(median(ttft)) if ttft else None,
        "seconds": _rounded(median(answer.seconds for answer in answers)) if answers else None,
    }


def _as_json(name: str, estimate: Estimate) -> dict[str, Any]:
    record: dict[str, Any] = {name: _rounded(estimate.value), "ci95": None}
    if estimate.ci95 is not None:
        record["ci95"] = [_rounded(bound) for bound in estimate.ci95]
    return record | ({"note": estimate.note} if estimate.note else {})


def _rounded(value: float) -> float:
    return round(float(value), _DIGITS)
