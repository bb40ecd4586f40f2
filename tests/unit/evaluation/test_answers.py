import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from f2l_vllm.evaluation.answers import ANSWERS_FILE, AnswerLog, AnswerRecord, read_answers
from f2l_vllm.evaluation.questions import Ask, Clip, Question, Reply
from tests.support.records import answer

SETTING = {"world": "held-out", "videos": 2, "max_tokens": 64}


def test_a_reply_is_scored_against_the_truth():
    question = Question("q", "What is it?", "A red circle.", "shape", "mine")
    clip = Clip("a.mp4", Path("a.mp4"), "whole.mp4", (question,))
    found = AnswerRecord.of(Ask(clip, question, "adapter", clip), Reply("A blue circle.", 9, 0, 21.126, 0.12345))
    assert (found.exact_match, found.f1, found.judge) == (False, 0.5, None)
    assert (found.video, found.source) == ("a.mp4", "whole.mp4")
    assert (found.id, found.arm, found.ttft_ms, found.seconds) == ("q", "adapter", 21.13, 0.1235)


def test_answers_come_back_and_go_on(tmp_path):
    with AnswerLog(tmp_path, SETTING) as log:
        log.append(answer("a", "colour"))
    with AnswerLog(tmp_path, SETTING) as log:
        assert log.answers == {("adapter", "a/colour"): answer("a", "colour")}
        log.append(answer("a", "shape", "frames"))
    assert [found.arm for found in read_answers(tmp_path / ANSWERS_FILE)] == ["adapter", "frames"]


def test_an_unfinished_line_is_forgotten(tmp_path):
    with AnswerLog(tmp_path, SETTING) as log:
        log.append(answer("a", "colour"))
        log.append(answer("a", "shape"))
    path = tmp_path / ANSWERS_FILE
    path.write_bytes(path.read_bytes()[:-30])  # as a kill in the middle of writing leaves it
    with AnswerLog(tmp_path, SETTING) as log:
        assert set(log.answers) == {("adapter", "a/colour")}
        log.append(answer("a", "shape"))
    assert len(read_answers(path)) == 2


def test_another_configuration_is_refused_and_named(tmp_path):
    AnswerLog(tmp_path, SETTING).__exit__()
    with pytest.raises(ValueError, match=r"videos: 2 there, 3 here.*--work"):
        AnswerLog(tmp_path, SETTING | {"videos": 3})
    AnswerLog(tmp_path, SETTING).__exit__()


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    with AnswerLog(tmp_path, SETTING), pytest.raises(ValueError, match="another evaluation is at work"):
        AnswerLog(tmp_path, SETTING)


def test_a_line_that_is_no_answer_is_named(tmp_path):
    (tmp_path / ANSWERS_FILE).write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 1: .*name a new folder"):
        AnswerLog(tmp_path, SETTING)


def test_a_line_without_a_source_is_of_a_whole_video(tmp_path):
    line = asdict(answer("a", "colour"))
    del line["source"]
    (tmp_path / ANSWERS_FILE).write_text(json.dumps(line) + "\n")
    assert read_answers(tmp_path / ANSWERS_FILE) == [answer("a", "colour")]


def test_answers_are_replaced_together(tmp_path):
    with AnswerLog(tmp_path, SETTING) as log:
        for kind in ("colour", "shape"):
            log.append(answer("a", kind))
        log.replace([replace(answer("a", "colour"), judge=4.0)])
        log.append(answer("a", "count"))
    assert [found.judge for found in read_answers(tmp_path / ANSWERS_FILE)] == [4.0, None, None]
