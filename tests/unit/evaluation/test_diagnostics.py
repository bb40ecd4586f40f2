"""The diagnostics of the shipped model on real mp4 files agree with how it answers, and their parts add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from f2l_vllm.base_models.text_layers import text_layers_of
from f2l_vllm.evaluation.diagnostics.measure import diagnose
from f2l_vllm.evaluation.in_process import TransformersAnswers
from f2l_vllm.evaluation.questions import ADAPTER, NONE, Clip, QuestionSet, plan
from f2l_vllm.evaluation.sources import world_questions
from f2l_vllm.video.reading import ReadingOptions

LAYERS, RANK = 4, 16


@pytest.fixture(scope="module")
def answers() -> TransformersAnswers:
    return TransformersAnswers("f2l-tiny", None, ReadingOptions(), max_tokens=16)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> QuestionSet:
    return world_questions("held-out", 2, 7, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def found(answers: TransformersAnswers, questions: QuestionSet) -> dict[str, Any]:
    done: list[tuple[int, int]] = []
    found = diagnose(answers, questions, on_progress=lambda *figures: done.append(figures))
    assert done == [(1, 2), (2, 2)]
    return json.loads(json.dumps(found))


def test_the_whole_adapter_and_none_score_as_their_arms_do(
    found: dict[str, Any], answers: TransformersAnswers, questions: QuestionSet
) -> None:
    right: dict[str, list[bool]] = {ADAPTER: [], NONE: []}

    def count(ask, reply) -> None:
        if ask.question.type not in questions.apart:
            right[ask.arm].append(reply.text == ask.question.truth)

    answers.answer(plan(questions.clips, (ADAPTER, NONE)), count, pytest.fail)
    whole, none = (sum(right[arm]) / len(right[arm]) for arm in (ADAPTER, NONE))
    assert len(right[ADAPTER]) == found["questions"] == 20
    assert whole > none + 0.3
    for name, curve in (found["rank_ablation"] | found["layer_removal"]).items():
        ends = [none, whole] if name == "keep strongest" else [whole, none]
        if name != "remove one":
            assert [curve[0]["score"], curve[-1]["score"]] == pytest.approx(ends, abs=1e-4), name


def test_curves_have_a_point_for_every_count_and_layer(found: dict[str, Any]) -> None:
    for curve in found["rank_ablation"].values():
        assert [point["at"] for point in curve] == [0, 1, 2, 4, 8, 16]
    assert [point["at"] for point in found["layer_removal"]["remove one"]] == [0, 1, 2, 3]
    assert [point["at"] for point in found["layer_removal"]["remove last"]] == [0, 1, 2, 3, 4]
    assert found["rank_ablation"]["keep strongest"][4]["score"] > found["rank_ablation"]["remove strongest"][4]["score"]


def test_norms_and_strengths_are_those_of_the_materialised_updates(
    found: dict[str, Any], answers: TransformersAnswers, questions: QuestionSet
) -> None:
    norms, strengths = [], []
    for clip in questions.clips:
        adapter = answers.internalizer.internalize(clip.path)
        a_LRI, b_LRO = adapter.factors["down_proj"]
        update_LOI = adapter.scale * b_LRO.mT @ a_LRI
        norms.append(update_LOI.norm(dim=(-2, -1)))
        strengths.append(torch.linalg.svdvals(update_LOI)[:, :RANK])
    expected_L = torch.stack(norms).mean(0)
    measured = found["update_norm"]["down_proj"]
    torch.testing.assert_close(torch.tensor(measured["frobenius"]), expected_L, rtol=1e-3, atol=1e-3)
    layers = text_layers_of(answers.internalizer.model)
    weights_L = torch.stack([layer.get_submodule("mlp.down_proj").weight.detach().norm() for layer in layers])
    torch.testing.assert_close(torch.tensor(measured["relative"]), expected_L / weights_L, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        torch.tensor(found["strengths"]["down_proj"]), torch.stack(strengths).mean(0), rtol=1e-3, atol=1e-3
    )


def test_parts_of_the_lead_add_up_and_the_adapter_is_what_makes_the_right_answer_lead(found: dict[str, Any]) -> None:
    leads = found["logit_attribution"]
    from_adapter = sum(layer["mean"] for layer in leads["adapter"])
    from_frozen = sum(layer["mean"] for layer in leads["base"])
    assert len(leads["adapter"]) == len(leads["base"]) == LAYERS
    assert leads["embedding"]["mean"] + from_frozen + from_adapter == pytest.approx(leads["lead"]["mean"], abs=1e-2)
    assert leads["lead"]["mean"] > 1
    assert from_adapter > 0.5


def test_clips_of_one_file_are_one_video(answers: TransformersAnswers, questions: QuestionSet) -> None:
    one, two = (replace(clip, questions=clip.questions[:2]) for clip in questions.clips)
    apart = diagnose(answers, replace(questions, clips=(one, two)))
    together = diagnose(answers, replace(questions, clips=(one, replace(two, source=one.source))))
    assert (apart["videos"], together["videos"]) == (2, 1)
    assert together["logit_attribution"]["lead"]["mean"] == apart["logit_attribution"]["lead"]["mean"]
    assert together["logit_attribution"]["lead"]["ci95"] is None, "one video has no interval"


def test_a_video_that_cannot_be_used_is_named_and_the_others_count(
    answers: TransformersAnswers, questions: QuestionSet, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    one, two = questions.clips
    short = replace(one, questions=one.questions[:2])
    bad = Clip("broken.mp4", broken, "broken.mp4", two.questions)
    found = diagnose(answers, replace(questions, clips=(bad, short)))
    assert [skipped["video"] for skipped in found["skipped"]] == ["broken.mp4"]
    assert (found["videos"], found["questions"]) == (1, 2)
    with pytest.raises(ValueError, match="not_a_video"):
        diagnose(answers, replace(questions, clips=(bad,)))
