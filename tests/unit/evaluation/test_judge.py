"""The judge against a small real HTTP server."""

from collections.abc import Callable, Iterator

import openai
import pytest

from f2l_vllm.evaluation.judge import Judge, parse_score
from f2l_vllm.evaluation.setup import JudgeSetup
from tests.support.endpoint import Endpoint, Reply
from tests.support.records import answer


@pytest.fixture
def endpoint() -> Iterator[Callable[..., Endpoint]]:
    opened: list[Endpoint] = []

    def open_endpoint(reply: Reply) -> Endpoint:
        opened.append(Endpoint(reply))
        return opened[-1]

    yield open_endpoint
    for one in opened:
        one.close()


def by_colour(messages):
    return '{"score": 5}' if "grade: Red." in messages[0]["content"] else 'Wrong colour.\n```json\n{"score": 1}\n```'


def test_each_answer_gets_the_judges_score(endpoint, tmp_path):
    served = endpoint(by_colour)
    answers = [answer("a", "colour"), answer("b", "colour", right=False)]
    found = Judge(served.url, "grader", "secret", tmp_path).score(answers)
    assert [found[one.key].score for one in answers] == [5, 1]
    assert set(served.keys) == {"Bearer secret"}
    prompt = served.requests[0]["messages"][0]["content"]
    for part in ("What colour?", "Reference answer: Red.", "from 0 to 5"):
        assert part in prompt
    assert {(request["model"], request["temperature"]) for request in served.requests} == {("grader", 0)}


@pytest.mark.parametrize(("name", "field"), [("paper-caption", "coverage_score"), ("paper-question", "score")])
def test_the_papers_rubrics_have_fields_of_their_own(endpoint, tmp_path, name, field):
    wrong, right = ("score", "coverage_score") if field == "coverage_score" else ("coverage_score", "score")
    served = endpoint(lambda messages: f'{{"{wrong if len(messages) == 1 else right}": 2}}')
    one = answer("a", "colour")
    judge = Judge(served.url, "grader", "none", tmp_path, rubric=name)
    assert judge.score([one])[one.key].score == 2
    assert f'"{field}": N' in served.requests[1]["messages"][2]["content"]
    assert {request["max_tokens"] for request in served.requests} == {1024}
    prompt = served.requests[0]["messages"][0]["content"]
    assert {"Red.", "What colour?"} <= {part.strip() for line in prompt.splitlines() for part in line.split(": ")}
    assert judge.configuration()["rubric"] == name


def test_an_unknown_rubric_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="choose one of answer, paper-caption, paper-question"):
        JudgeSetup("http://judge/v1", "grader", "none", "kind")


def test_nothing_is_judged_twice(endpoint, tmp_path):
    served = endpoint(by_colour)
    judge = Judge(served.url, "grader", "none", tmp_path)
    everywhere = [answer(video, "colour", arm) for video in "abc" for arm in ("adapter", "frames")]
    judge.score(everywhere)
    assert len(served.requests) == 1  # the same question, truth and answer
    again = Judge(served.url, "grader", "none", tmp_path).score(everywhere)
    assert len(served.requests) == 1
    assert {judgement.score for judgement in again.values()} == {5}
    Judge(served.url, "another", "none", tmp_path).score(everywhere)
    assert len(served.requests) == 2


def test_a_reply_without_a_score_is_asked_for_again(endpoint, tmp_path):
    served = endpoint(lambda messages: "It is fine." if len(messages) == 1 else '{"score": 4}')
    one = answer("a", "colour")
    assert Judge(served.url, "grader", "none", tmp_path).score([one])[one.key].score == 4
    assert [len(request["messages"]) for request in served.requests] == [1, 3]


def test_a_judge_that_never_scores_gives_no_number_and_is_asked_anew_next_time(endpoint, tmp_path):
    served = endpoint(lambda _: '{"score": 9}')
    one = answer("a", "colour")
    for attempts in (3, 6):
        found = Judge(served.url, "grader", "none", tmp_path).score([one])[one.key]
        assert (found.score, found.reply) == (None, '{"score": 9}')
        assert len(served.requests) == attempts


def test_what_was_judged_before_a_failure_is_kept(endpoint, tmp_path):
    served = endpoint(lambda messages: None if "count" in messages[0]["content"] else '{"score": 3}')
    judged = [answer("a", kind) for kind in ("colour", "shape")]
    judge = Judge(served.url, "grader", "wrong", tmp_path, concurrency=1)
    with pytest.raises(openai.AuthenticationError, match="no such key"):
        judge.score([*judged, answer("a", "count")])
    asked = len(served.requests)
    assert {found.score for found in judge.score(judged).values()} == {3}
    assert len(served.requests) == asked


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 3}', 3),
        ('{"score": 3.0}', 3),
        ('First {"score": 1}, no: {"score":4 }', 4),
        ('{"reason": "x", "score": 0, "more": 1}', 0),
        ('{"score": 2.5}', None),
        ('{"score": -1}', None),
        ('{"score": 6}', None),
        ("5", None),
        ("score: 5", None),
        ("", None),
    ],
)
def test_only_whole_numbers_on_the_scale_are_scores(reply, score):
    assert parse_score(reply) == score
