"""Traces are the same for everyone, as popular and as frequent as they say, and replayed as they stand."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from f2l_vllm.bench import trace
from f2l_vllm.client import Answer


def make(requests: int = 1000, **changes: object) -> list[trace.Request]:
    settings = {"videos": 64, "questions": 8, "popularity": "uniform", "zipf_alpha": 1.0, "request_rate": None}
    return trace.make(requests, **(settings | {"seed": 7} | changes))  # type: ignore[arg-type]


def test_the_same_seed_is_the_same_trace_and_another_is_not() -> None:
    assert make() == make()
    assert make() != make(seed=8)


def test_a_longer_trace_begins_with_the_shorter() -> None:
    assert make(1000, request_rate=3.0)[:100] == make(100, request_rate=3.0)


def test_popularity_changes_neither_questions_nor_arrivals() -> None:
    uniform, zipf = make(request_rate=3.0), make(request_rate=3.0, popularity="zipf")
    assert [(r.at, r.question) for r in uniform] == [(r.at, r.question) for r in zipf]
    assert [r.video for r in uniform] != [r.video for r in zipf]


def test_zipf_gives_the_first_video_its_share_and_uniform_does_not() -> None:
    share = 1 / sum(1 / place for place in range(1, 65))  # 0.211
    zipf = [request.video for request in make(20000, popularity="zipf")]
    assert zipf.count(0) / len(zipf) == pytest.approx(share, rel=0.05)
    assert zipf.count(3) / len(zipf) == pytest.approx(share / 4, rel=0.1)
    uniform = [request.video for request in make(20000)]
    assert uniform.count(0) / len(uniform) == pytest.approx(1 / 64, rel=0.15)


def test_a_larger_alpha_is_more_skewed() -> None:
    counts = [[r.video for r in make(5000, popularity="zipf", zipf_alpha=a)].count(0) for a in (0.5, 1.0, 2.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[1] / 2 < counts[2]


def test_poisson_arrivals_come_at_their_rate_and_apart() -> None:
    times = [request.at for request in make(20000, request_rate=5.0)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 5, rel=0.03)
    # Exponential gaps: as wide as they are long.
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.05)


def answer(number: int) -> Answer:
    return Answer(0.0, 0.0, 0.0, (), number, 1)


def test_a_closed_loop_has_so_many_at_work_and_answers_in_order() -> None:
    asked = make(50)
    working = most = 0

    async def ask(request: trace.Request, arrived: float | None) -> Answer:
        nonlocal working, most
        assert arrived is None
        working += 1
        most = max(most, working)
        await asyncio.sleep(0.001 * request.question)
        working -= 1
        return answer(request.video)

    answers, seconds = asyncio.run(trace.replay(asked, ask, concurrency=4))
    assert most == 4
    assert [one.prompt_tokens for one in answers] == [request.video for request in asked]
    assert seconds > 0


def test_a_question_that_waits_for_an_asker_arrived_when_the_trace_says() -> None:
    asked = [trace.Request(0.01 * number, 0, 0) for number in range(1, 4)]
    arrivals: list[float] = []

    async def ask(_request: trace.Request, arrived: float | None) -> Answer:
        assert arrived is not None
        assert time.perf_counter() >= arrived
        arrivals.append(arrived)
        await asyncio.sleep(0.05)
        return answer(0)

    asyncio.run(trace.replay(asked, ask, concurrency=1))
    assert [after - arrivals[0] for after in arrivals] == pytest.approx([0.0, 0.01, 0.02])


def test_a_failed_question_ends_the_replay_with_its_error() -> None:
    async def ask(request: trace.Request, _arrived: float | None) -> Answer:
        if request.video == asked[3].video:
            raise ConnectionError("the server has gone")
        await asyncio.sleep(0.001)
        return answer(0)

    asked = make(100)
    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(trace.replay(asked, ask, concurrency=4))
