"""The model that is shipped answers about videos it has never seen, from their adapters alone."""

import json

import pytest

from f2l_vllm import models
from f2l_vllm.training.score import ADAPTER, IN_CONTEXT, NEITHER, WRONG_VIDEO, Scorer
from f2l_vllm.training.world import sample_scenes


@pytest.fixture(scope="module")
def scorer():
    return Scorer(models.resolve(models.DEFAULT_MODEL))


def test_adapters_of_fresh_mp4_files_answer_far_above_the_controls(scorer, tmp_path):
    tallies = scorer.score_mp4(sample_scenes(12, seed=90210, split="held-out"), tmp_path, seed=5)
    score = {arm: tally.summary()["exact_match"] for arm, tally in tallies.items()}
    assert score[ADAPTER] > score[NEITHER] + 0.3
    assert score[ADAPTER] > score[WRONG_VIDEO] + 0.3
    assert score[ADAPTER] - score[NEITHER] > 0.6 * (score[IN_CONTEXT] - score[NEITHER])


def test_drawn_frames_give_the_same_picture(scorer):
    tallies = scorer.score_tensors(sample_scenes(32, seed=90211, split="held-out"), seed=6)
    score = {arm: tally.summary()["exact_match"] for arm, tally in tallies.items()}
    assert score[ADAPTER] - score[NEITHER] > 0.6 * (score[IN_CONTEXT] - score[NEITHER])


def test_an_answer_is_a_sentence_in_words(scorer):
    assert scorer.answer(["Is there a red circle?"])[0] in ("Yes.", "No.")


def test_the_report_belongs_to_the_files():
    directory = models.resolve(models.DEFAULT_MODEL)
    report = json.loads((directory / "training.json").read_text())
    for name, size in report["bytes"].items():
        assert (directory / name).stat().st_size == size, name
    assert sum(report["bytes"].values()) < 12e6
    assert set(report["stages"]) == {"vision", "vlm", "refinement", "hypernetwork"}
