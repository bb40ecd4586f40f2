"""The model that is shipped answers about videos it has never seen, from their adapters alone."""

import json
from collections import defaultdict

import pytest

from f2l_vllm import models
from f2l_vllm.evaluation.in_process import TransformersAnswers
from f2l_vllm.evaluation.questions import ADAPTER, ARMS, FRAMES, NONE, WRONG_VIDEO, Ask, Reply, plan
from f2l_vllm.evaluation.sources import world_questions
from f2l_vllm.recipes.f2l_tiny import hypernetwork_stage, vlm_stage
from f2l_vllm.recipes.f2l_tiny.recipe import make_model
from f2l_vllm.recipes.f2l_tiny.score import Scorer
from f2l_vllm.synthetic.world import sample_scenes
from f2l_vllm.video.reading import ReadingOptions


def test_adapters_of_fresh_mp4_files_answer_far_above_the_controls(tmp_path):
    right = defaultdict(list)
    answers = TransformersAnswers(models.DEFAULT_MODEL, None, ReadingOptions(), max_tokens=40)
    asks = plan(world_questions("held-out", 6, 90210, tmp_path).clips, ARMS)

    def count(ask: Ask, reply: Reply) -> None:
        right[ask.arm].append(reply.text == ask.question.truth)

    answers.answer(asks, count, lambda skipped: pytest.fail(str(skipped)))
    score = {arm: sum(some) / len(some) for arm, some in right.items()}
    assert len(right[ADAPTER]) == len(asks) / len(ARMS)
    assert score[ADAPTER] > score[NONE] + 0.3
    assert score[ADAPTER] > score[WRONG_VIDEO] + 0.3
    assert score[ADAPTER] - score[NONE] > 0.8 * (score[FRAMES] - score[NONE])


def test_drawn_frames_give_the_same_picture():
    scorer = Scorer(models.resolve(models.DEFAULT_MODEL))
    tallies = scorer.score_tensors(sample_scenes(32, seed=90211, split="held-out"), seed=6)
    score = {arm: tally.summary()["exact_match"] for arm, tally in tallies.items()}
    assert score[ADAPTER] - score[NONE] > 0.8 * (score[FRAMES] - score[NONE])


def test_a_short_training_learns_to_answer_from_adapters(tmp_path, monkeypatch):
    for stage in (vlm_stage, hypernetwork_stage):
        monkeypatch.setattr(stage, "BATCH", 12)
    report = make_model(tmp_path, base=models.resolve(models.DEFAULT_MODEL), scale=0.04, score_scenes=32)
    stage = report["stages"]["hypernetwork"]
    assert stage["loss"] < 0.7 * stage["first_loss"]
    scores = report["scores"]["held-out scenes"]
    assert scores[ADAPTER]["exact_match"] > scores[NONE]["exact_match"] + 0.1


def test_the_report_belongs_to_the_files():
    directory = models.resolve(models.DEFAULT_MODEL)
    report = json.loads((directory / "training.json").read_text())
    for name, size in report["bytes"].items():
        assert (directory / name).stat().st_size == size, name
    assert sum(report["bytes"].values()) < 12e6
    assert set(report["stages"]) == {"vision", "vlm", "refinement", "hypernetwork"}
