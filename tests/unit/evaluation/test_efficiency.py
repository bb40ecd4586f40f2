"""Accuracy over cost, measured in process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from f2l_vllm.evaluation import efficiency as module
from f2l_vllm.evaluation.answers import ANSWERS_FILE, read_answers
from f2l_vllm.evaluation.efficiency import WAYS, efficiency
from f2l_vllm.evaluation.plots import plot_efficiency
from f2l_vllm.evaluation.questions import Clip, Question, QuestionSet
from f2l_vllm.evaluation.setup import Setup
from tests.support.videos import write_video

TEXTS = ("What is the background?", "Describe the video.")
SETUP = Setup(keep_rate=0.5, max_tokens=8)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuestionSet, dict[str, Any]]:
    work = tmp_path_factory.mktemp("efficiency")
    path = write_video(work / "bars.mp4", frames=40, fps=10)
    clip = Clip("bars", path, "bars", tuple(Question(text, text, "Gray.", "type", "set") for text in TEXTS))
    questions = QuestionSet({"set": "bars"}, (clip,), "exact_match")
    return work, questions, efficiency(questions, SETUP, work / "answers")


def test_every_way_is_asked_and_costs_what_it_reads(measured: tuple[Path, QuestionSet, dict[str, Any]]) -> None:
    work, _, result = measured
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == list(WAYS)
    assert {row["n"] for row in rows.values()} == {2}
    visual = {name: row["visual_tokens"] for name, row in rows.items()}
    assert visual == {
        **{"frames": 32, "frames-cached": 32, "frames-evs": 16, "frames-merged": 16, "frames-v2drop": 23},
        **{"adapter": 0, "adapter-merged": 0},
    }
    text = rows["adapter"]["prompt_tokens"]
    assert text == rows["adapter-merged"]["prompt_tokens"] < rows["frames-evs"]["prompt_tokens"] - 16
    assert rows["frames"]["prompt_tokens"] == rows["frames-cached"]["prompt_tokens"]
    assert all(row["ttft_ms"]["median"] > 0 and row["ttft_ms"]["n"] == 2 for row in rows.values())
    answers = {(one.arm, one.id): one.answer for one in read_answers(work / "answers" / ANSWERS_FILE)}
    for text in TEXTS:
        assert answers["frames-cached", text] == answers["frames", text]
    assert [path.name for path in plot_efficiency(result, work / "plots")] == ["efficiency.png"]


def test_what_was_answered_is_not_asked_again(
    measured: tuple[Path, QuestionSet, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, questions, result = measured
    monkeypatch.setattr(module, "TransformersAnswers", None)
    assert efficiency(questions, SETUP, work / "answers") == result
    with pytest.raises(ValueError, match=r"keep_rate: 0\.5 there, 0\.3 here"):
        efficiency(questions, replace(SETUP, keep_rate=0.3), work / "answers")
    with pytest.raises(ValueError, match="below 1"):
        efficiency(questions, replace(SETUP, keep_rate=1), work / "answers")
