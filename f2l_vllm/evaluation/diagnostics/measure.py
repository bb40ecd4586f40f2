"""Which parts of an adapter hold the answers: the paper's diagnostics for any model, hypernetwork and videos.

- rank ablation: the score with only the strongest singular directions of every layer's update, without them, and
  without the same number of random ones;
- layer removal: the score without one layer's update, without the first ones, without the last ones;
- update norm: the size of every layer's update, and relative to the frozen weight it is added to;
- logit attribution: what every layer's update adds to the right answer's lead over wrong ones.

Source: Frames2LoRA (arXiv 2606.04351), appendix. `docs/diagnostics.md` says how to read them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from f2l_vllm.evaluation import statistics
from f2l_vllm.evaluation.answers import AnswerRecord
from f2l_vllm.evaluation.diagnostics.ablation import INTACT, Curve, Cut, cut_all, layer_curves, rank_curves
from f2l_vllm.evaluation.diagnostics.attribution import attribute, contest
from f2l_vllm.evaluation.diagnostics.directions import decompose, update_norms, weight_norms
from f2l_vllm.evaluation.in_process import TransformersAnswers
from f2l_vllm.evaluation.questions import ADAPTER, Ask, Clip, Question, QuestionSet
from f2l_vllm.evaluation.scores import macro_values, measure
from f2l_vllm.hypernetwork.adapter import Adapter
from f2l_vllm.video.errors import VideoError

Progress = Callable[[int, int], None]  # videos done, of how many

_MOST_RIVALS = 64  # wrong answers that the right one is compared with
_DIGITS = 5

Row = tuple[str, str, float]  # the clip's source file, type, value


def diagnose(
    answers: TransformersAnswers, questions: QuestionSet, *, seed: int = 0, on_progress: Progress | None = None
) -> dict[str, Any]:
    """All four diagnostics, as JSON.

    Args:
        answers: the model and its hypernetwork; in fp32 attribution is exact.
        questions: what is asked; types that are scored apart are left out.
        seed: of the random directions, and of the draw of wrong answers where there are very many.

    Raises:
        ValueError: no video can be used, or there is nothing to ask.
    """
    diagnosis = _Diagnosis(answers, questions, seed)
    skipped = []
    for number, clip in enumerate(questions.clips):
        try:
            diagnosis.add(clip, seed + number)
        except VideoError as error:
            skipped.append({"video": clip.id, "reason": f"{error.code}: {error.message}"})
        if on_progress:
            on_progress(number + 1, len(questions.clips))
    if not diagnosis.scores:
        reason = f"; the first reason: {skipped[0]['reason']}" if skipped else ""
        raise ValueError(f"no question about any of {len(questions.clips)} videos could be asked{reason}")
    return {"metric": questions.metric, "seed": seed, **diagnosis.as_json(), "skipped": skipped}


class _Diagnosis:
    """Collects the measurements, video by video."""

    def __init__(self, answers: TransformersAnswers, questions: QuestionSet, seed: int) -> None:
        self.scores: dict[Cut, list[Row]] = defaultdict(list)
        self._answers = answers
        self._metric, self._apart = questions.metric, questions.apart
        self._rivals = _rivals(questions, seed)
        self._curves: dict[str, dict[str, Curve]] = {}
        self._shape: dict[str, Any] = {}
        self._leads: dict[str, list[Row]] = defaultdict(list)
        self._norms: dict[str, list[Tensor]] = defaultdict(list)
        self._strengths: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, clip: Clip, seed: int) -> None:
        """Watch a clip and take its adapter apart.

        Raises:
            VideoError: the clip cannot be used.
        """
        asked = [question for question in clip.questions if question.type not in self._apart]
        adapter = self._answers.internalizer.internalize(clip.path)
        directions = decompose(adapter)
        if not self._curves:
            most = max(found.strengths_LK.shape[1] for found in directions.values())
            self._curves = {"rank_ablation": rank_curves(most), "layer_removal": layer_curves(adapter.num_layers)}
            self._shape = {"rank": adapter.rank, "layers": adapter.num_layers, "modules": sorted(adapter.factors)}
        for name, norms_L in update_norms(adapter).items():
            self._norms[name].append(norms_L.cpu())
            self._strengths[name].append(directions[name].strengths_LK)
        cuts = {cut for curves in self._curves.values() for curve in curves.values() for _, cut in curve}
        self._score(clip, asked, cut_all(adapter, directions, cuts, seed))
        for question in asked:
            self._attribute(clip, question, adapter)

    def as_json(self) -> dict[str, Any]:
        """Means over videos and types of questions, with intervals over videos."""
        rows = self.scores[Cut(INTACT)]
        weights = weight_norms(self._answers.internalizer.model, self._shape["modules"])
        norms = {name: torch.stack(found) for name, found in self._norms.items()}
        return {
            "videos": len({video for video, _, _ in rows}),
            "questions": len(rows),
            **self._shape,
            **{
                group: {name: self._points(curve) for name, curve in curves.items()}
                for group, curves in self._curves.items()
            },
            "update_norm": {
                name: {
                    "frobenius": _rounded(norms_VL.mean(0)),
                    "relative": _rounded((norms_VL / weights[name].cpu()).mean(0)),
                }
                for name, norms_VL in norms.items()
            },
            "strengths": {name: _rounded(torch.stack(found).mean(0)) for name, found in self._strengths.items()},
            "logit_attribution": {
                "lead": _mean(self._leads["lead"], "mean"),
                "embedding": _mean(self._leads["embedding"], "mean"),
                **{
                    part: [_mean(self._leads[f"{part} {layer}"], "mean") for layer in range(self._shape["layers"])]
                    for part in ("base", "adapter")
                },
            },
        }

    def _score(self, clip: Clip, asked: list[Question], parts: Iterable[tuple[Cut, Adapter | None]]) -> None:
        """Ask every question with every part of the adapter."""
        asks = [Ask(clip, question, ADAPTER, clip) for question in asked]
        for cut, part in parts:
            for ask, reply in zip(asks, self._answers.replies(asks, part), strict=True):
                score = measure(AnswerRecord.of(ask, reply), self._metric)
                assert score is not None  # only a judge leaves answers without a score
                self.scores[cut].append((clip.source, ask.question.type, score))

    def _attribute(self, clip: Clip, question: Question, adapter: Adapter) -> None:
        internalizer = self._answers.internalizer
        where = contest(internalizer.processor, question.text, question.truth, self._rivals[question.type])
        parts = attribute(internalizer.model, adapter, where)
        values = {"embedding": parts.embedding, "lead": parts.lead}
        values |= {f"base {layer}": value for layer, value in enumerate(parts.base_L.tolist())}
        values |= {f"adapter {layer}": value for layer, value in enumerate(parts.lora_L.tolist())}
        for name, value in values.items():
            self._leads[name].append((clip.source, question.type, value))

    def _points(self, curve: Curve) -> list[dict[str, Any]]:
        return [{"at": at, **_mean(self.scores[cut], "score")} for at, cut in curve]


def _rivals(questions: QuestionSet, seed: int) -> dict[str, list[str]]:
    """Type -> true answers to questions of that type, at most `_MOST_RIVALS`."""
    truths: dict[str, set[str]] = defaultdict(set)
    for clip in questions.clips:
        for question in clip.questions:
            truths[question.type].add(question.truth)
    rng = random.Random(f"rivals:{seed}")
    return {
        kind: sorted(found) if len(found) <= _MOST_RIVALS else rng.sample(sorted(found), _MOST_RIVALS)
        for kind, found in truths.items()
    }


def _mean(rows: list[Row], name: str) -> dict[str, Any]:
    """The macro mean over types with its interval over videos."""
    estimate = statistics.mean(macro_values(rows))
    interval = None if estimate.ci95 is None else [round(bound, _DIGITS) for bound in estimate.ci95]
    return {name: round(estimate.value, _DIGITS), "ci95": interval}


def _rounded(values: Tensor) -> Any:
    return torch.round(values.double(), decimals=_DIGITS).tolist()
