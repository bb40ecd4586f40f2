"""Answers in process from frames of which visual tokens are dropped."""

from pathlib import Path

import pytest

from f2l_vllm.evaluation.in_process import TransformersAnswers
from f2l_vllm.evaluation.questions import DROPPING_ARMS, EVS, FRAMES, V2DROP, Ask, Clip, Question, Reply
from f2l_vllm.evaluation.setup import Setup
from f2l_vllm.video.reading import ReadingOptions
from tests.support.videos import write_video


def answers(path: Path, keep: float, *arms: str) -> dict[str, list[Reply]]:
    texts = ("What is the background?", "Describe the video.")
    clip = Clip("clip", path, "clip", tuple(Question(text, text, "", "type", "set") for text in texts))
    replies: dict[str, list[Reply]] = {arm: [] for arm in arms}
    TransformersAnswers("f2l-tiny", None, ReadingOptions(), max_tokens=16, keep_rate=keep).answer(
        [Ask(clip, question, arm, clip) for arm in arms for question in clip.questions],
        lambda ask, reply: replies[ask.arm].append(reply),
        lambda skipped: pytest.fail(skipped.reason),
    )
    return replies


def test_fewer_tokens_are_read_and_where_none_is_dropped_answers_are_the_same(tmp_path: Path) -> None:
    path = write_video(tmp_path / "bars.mp4", frames=40, fps=10)
    same, half = answers(path, 1.0, FRAMES, *DROPPING_ARMS), answers(path, 0.5, *DROPPING_ARMS)
    for arm in DROPPING_ARMS:
        assert [(one.text, one.prompt_tokens, one.visual_tokens) for one in same[arm]] == [
            (one.text, one.prompt_tokens, one.visual_tokens) for one in same[FRAMES]
        ]
    assert [one.visual_tokens for one in half[EVS]] == [16, 16]
    assert [one.visual_tokens for one in half[V2DROP]] == [round((32 + 25 + 20 + 16) / 4)] * 2
    for arm in DROPPING_ARMS:
        saved = [a.prompt_tokens - b.prompt_tokens for a, b in zip(same[FRAMES], half[arm], strict=True)]
        assert saved == [32 - one.visual_tokens for one in half[arm]]


def test_frames_that_do_not_fit_are_skipped_with_a_reason(tmp_path: Path) -> None:
    path = write_video(tmp_path / "long.mp4", frames=600, fps=4, size=(32, 32))
    clip = Clip("clip", path, "clip", (Question("id", "What is it?", "", "type", "set"),))
    skipped: list[str] = []
    TransformersAnswers("f2l-tiny", None, ReadingOptions(600), max_tokens=4).answer(
        [Ask(clip, clip.questions[0], FRAMES, clip)],
        lambda ask, reply: pytest.fail("answered beyond the context"),
        lambda one: skipped.append(one.reason),
    )
    (reason,) = skipped
    assert reason.startswith("video_too_long: ")


def test_a_setup_names_its_arms_and_does_not_merge_what_it_drops() -> None:
    assert Setup(arms=(EVS,)).needs_models
    assert Setup(arms=(EVS,), base_url="http://127.0.0.1:1/v1").needs_models
    with pytest.raises(ValueError, match="merged or dropped"):
        Setup(arms=(V2DROP,), merge_rate=0.5)
    with pytest.raises(ValueError, match="above 0"):
        Setup(arms=(EVS,), keep_rate=0.0)
