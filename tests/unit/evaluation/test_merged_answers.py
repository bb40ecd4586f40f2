"""Answers in process from merged visual tokens."""

from pathlib import Path

import pytest

from f2l_vllm.evaluation.in_process import TransformersAnswers
from f2l_vllm.evaluation.questions import ADAPTER, FRAMES, Ask, Clip, Question, Reply
from f2l_vllm.evaluation.setup import Setup
from f2l_vllm.video.reading import ReadingOptions
from tests.support.videos import write_video

NOTHING_MERGED = 1e-20  # a rate that takes merging's way through the code


def answers(path: Path, rate: float) -> dict[str, list[Reply]]:
    """Two questions of unequal length about one video, from its frames and from its adapter."""
    texts = ("What is the background?", "Describe the video.")
    questions = tuple(Question(text, text, "", "type", "set") for text in texts)
    clip = Clip("clip", path, "clip", questions)
    replies: dict[str, list[Reply]] = {FRAMES: [], ADAPTER: []}
    TransformersAnswers("f2l-tiny", None, ReadingOptions(merge_rate=rate), max_tokens=16).answer(
        [Ask(clip, question, arm, clip) for arm in replies for question in questions],
        lambda ask, reply: replies[ask.arm].append(reply),
        lambda skipped: pytest.fail(skipped.reason),
    )
    return replies


def test_fewer_tokens_are_read_and_where_none_is_merged_answers_are_the_same(tmp_path: Path) -> None:
    path = write_video(tmp_path / "bars.mp4", frames=40, fps=10)
    usual, same, merged = (answers(path, rate) for rate in (0.0, NOTHING_MERGED, 0.5))
    for arm in (FRAMES, ADAPTER):
        assert [reply.text for reply in same[arm]] == [reply.text for reply in usual[arm]]
        assert [reply.prompt_tokens for reply in same[arm]] == [reply.prompt_tokens for reply in usual[arm]]
    assert [reply.visual_tokens for reply in usual[FRAMES]] == [32, 32]
    assert [reply.visual_tokens for reply in merged[FRAMES]] == [16, 16]
    saved = [a.prompt_tokens - b.prompt_tokens for a, b in zip(usual[FRAMES], merged[FRAMES], strict=True)]
    assert saved == [16, 16]
    assert [reply.prompt_tokens for reply in merged[ADAPTER]] == [reply.prompt_tokens for reply in usual[ADAPTER]]


def test_a_running_server_has_its_own_rate_and_a_rate_is_below_one() -> None:
    with pytest.raises(ValueError, match="rate of merging"):
        Setup(base_url="http://127.0.0.1:1/v1", merge_rate=0.5)
    with pytest.raises(ValueError, match="less than 1"):
        Setup(merge_rate=1.0)
