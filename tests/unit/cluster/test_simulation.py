"""The simulation agrees with closed forms where there are some."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from f2l_vllm.cluster.capacity import POLICIES
from f2l_vllm.cluster.policy import LeastLoaded
from f2l_vllm.cluster.simulation import Outcome, Scenario, Simulation

ONE = Scenario(servers=1, videos=200, zipf=0, places=50, copies=100, concurrency=8, load_s=0.01, fetch_s=0.1)


def simulated(scenario: Scenario, policy: str = "least-loaded", questions: int = 40_000, seed: int = 1) -> Outcome:
    return Simulation(scenario, POLICIES[policy](scenario), seed).run(questions)


def test_of_videos_that_are_all_alike_as_many_are_hit_as_there_are_places() -> None:
    outcome = simulated(ONE)
    assert outcome.hit_rate == pytest.approx(50 / 200, abs=0.01)
    assert outcome.store_share == pytest.approx(1 - 100 / 200, abs=0.01)
    assert outcome.imbalance == 1
    assert outcome.settled


def test_a_few_popular_videos_are_hit_as_often_as_ches_approximation_says() -> None:
    shares = np.arange(1, 201, dtype=float) ** -0.9
    shares /= shares.sum()
    seconds = min(np.arange(1, 2000), key=lambda t: abs((1 - np.exp(-shares * t)).sum() - 50))
    expected = (shares * (1 - np.exp(-shares * seconds))).sum()
    assert simulated(replace(ONE, zipf=0.9)).hit_rate == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("policy", POLICIES)
def test_when_all_adapters_fit_everywhere_nothing_is_loaded(policy: str) -> None:
    scenario = Scenario(servers=3, videos=40, zipf=0.9, rate=20, places=40, concurrency=8)
    outcome = simulated(scenario, policy)
    assert outcome.hit_rate > 0.999  # a server may still be asked about a video for the first time
    assert outcome.added_p99_ms == pytest.approx(0, abs=1e-6)
    assert outcome.throughput == pytest.approx(20, rel=0.03)


def test_servers_with_all_adapters_and_always_work_answer_all_they_can() -> None:
    scenario = Scenario(servers=3, videos=40, places=40, concurrency=8)
    assert scenario.ideal == 3 * 8 / 0.36
    assert simulated(scenario).throughput == pytest.approx(scenario.ideal, rel=0.001)


@pytest.mark.parametrize("busy", [0.3, 0.8])
def test_questions_wait_for_one_place_as_an_m_d_1_queue_says(busy: float) -> None:
    scenario = Scenario(servers=1, videos=1, concurrency=1, rate=busy, first_token_s=0.5, answer_s=1)

    def waits_at_most(seconds: float) -> float:
        """Erlang, 1909."""
        terms = ((busy * (k - seconds)) ** k / math.factorial(k) * math.exp(busy * (seconds - k)) for k in range(100))
        return (1 - busy) * sum(term for k, term in enumerate(terms) if k <= seconds)

    outcome = simulated(scenario, questions=200_000 if busy > 0.5 else 40_000)  # a long queue is long remembered
    if busy < 0.5:
        assert outcome.added_median_ms == 0
    else:
        assert waits_at_most(outcome.added_median_ms / 1e3) == pytest.approx(0.5, abs=0.02)
    assert waits_at_most(outcome.added_p99_ms / 1e3) == pytest.approx(0.99, abs=0.003)


def test_a_load_delays_whoever_is_in_work_and_a_fetch_only_its_question() -> None:
    outcome = simulated(ONE)
    loads = 1 - outcome.hit_rate
    seconds = ONE.answer_s + outcome.store_share * ONE.fetch_s + 8 * loads * ONE.load_s
    assert outcome.throughput == pytest.approx(8 / seconds, rel=0.01)


def test_the_same_seed_has_the_same_outcome() -> None:
    scenario = Scenario(servers=3, videos=500, rate=80, places=30)
    for policy in POLICIES:
        first, again, other = (simulated(scenario, policy, 2000, seed) for seed in (1, 1, 2))
        assert first == again
        assert first != other


def test_a_video_that_keeps_its_server_needs_less_memory() -> None:
    scenario = Scenario(servers=8, videos=2000, places=64, concurrency=16, rate=200)
    least, haproxy, warm = (simulated(scenario, policy, 10_000).hit_rate for policy in POLICIES)
    assert least + 0.1 < haproxy < warm


def test_no_more_questions_are_in_work_than_clients_ask() -> None:
    class Watched(LeastLoaded):
        most = 0

        def choose(self, video: str, loads: Mapping[str, int]) -> str:
            self.most = max(self.most, sum(loads.values()) + 1)
            assert min(loads.values()) >= 0
            return super().choose(video, loads)

    for clients in (1, 5):
        policy = Watched()
        Simulation(Scenario(servers=3, videos=100, clients=clients), policy, 1).run(1000)
        assert policy.most == clients


def test_caches_that_were_not_filled_are_said() -> None:
    assert not Simulation(ONE, LeastLoaded(), 1).run(1000, warm_up=100).settled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"servers": 0}, "servers is 0: give a number from 1 on"),
        ({"zipf": -1.0}, "zipf is -1.0: give a number from 0 on"),
        ({"zipf": math.nan}, "zipf is nan: give a number from 0 on"),
        ({"rate": 0.0}, "rate is 0.0: give a number above 0, or none for servers that always have work"),
        ({"rate": 1.0, "clients": 1}, "rate and clients are two ways to ask: give one of them"),
        ({"answer_s": 0.01}, "an answer of 0.01 s cannot have its first token after 0.06 s"),
    ],
)
def test_figures_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        replace(ONE, **changes)
    assert str(caught.value) == message
