"""A policy keeps a video's questions together, and nobody above its bound."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator

import pytest

from f2l_vllm.cluster.policy import BOUND, HAProxyHash, LeastLoaded, Policy, Recent, WarmFirst
from f2l_vllm.rendezvous import home

SERVERS = [f"server-{number}" for number in range(1, 8)]
IDLE = dict.fromkeys(SERVERS, 0)
VIDEOS = [f"video-{number}" for number in range(3000)]
BOUNDED: list[Callable[[], Policy]] = [lambda: HAProxyHash(SERVERS), lambda: WarmFirst(8, 4)]


def choices(policy: Policy, in_work: int) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Video, server chosen, and loads with it: half of all questions about one video, answers ending in no order."""
    rng, loads, working = random.Random(1), dict(IDLE), deque[str]()
    for _ in range(4000):
        video = "popular" if rng.random() < 0.5 else rng.choice(VIDEOS)
        server = policy.choose(video, loads)
        loads[server] += 1
        working.append(server)
        yield video, server, dict(loads)
        if len(working) >= in_work:
            working.rotate(rng.randrange(len(working)))
            loads[working.popleft()] -= 1


def test_least_loaded_takes_turns_among_equals() -> None:
    policy = LeastLoaded()
    assert [policy.choose("a", IDLE) for _ in SERVERS] == SERVERS
    assert policy.choose("a", {**IDLE, SERVERS[0]: 1}) == SERVERS[1]
    assert policy.choose("a", dict.fromkeys(SERVERS, 2) | {SERVERS[4]: 1}) == SERVERS[4]


def test_haproxys_bound_is_never_exceeded() -> None:
    full = 0
    for _, server, loads in choices(HAProxyHash(SERVERS), in_work=40):
        dealt, place = math.ceil(sum(loads.values()) * BOUND), SERVERS.index(server)
        most = max(1, (place + 1) * dealt // 7 - place * dealt // 7)
        assert loads[server] <= most
        full += loads[server] == most
    assert full > 1000


def test_warm_firsts_bound_is_exceeded_at_a_home_alone_and_no_further_than_the_looser_one() -> None:
    above = 0
    for video, server, loads in choices(WarmFirst(8, 4), in_work=40):
        mean = sum(loads.values()) / 7
        assert loads[server] <= max(2, math.ceil(1.5 * mean))
        if loads[server] > max(2, math.ceil(BOUND * mean)):
            assert server == home(video, SERVERS)
            above += 1
    assert above > 10


def test_with_little_to_do_nobody_is_above_half_of_what_it_answers_at_a_time() -> None:
    assert {loads[server] for _, server, loads in choices(WarmFirst(8, 8), in_work=5)} == {1, 2, 3, 4}


@pytest.mark.parametrize("new", BOUNDED)
def test_with_little_to_do_a_video_stays_at_one_server(new: Callable[[], Policy]) -> None:
    policy = new()
    first = {video: policy.choose(video, IDLE) for video in VIDEOS}
    assert min(Counter(first.values()).values()) > 100
    busy = {**IDLE, first[VIDEOS[0]]: 1}
    assert {video: policy.choose(video, IDLE) for video in VIDEOS} == first
    if isinstance(policy, WarmFirst):
        assert policy.choose(VIDEOS[0], busy) == first[VIDEOS[0]]


@pytest.mark.parametrize("new", BOUNDED)
def test_when_a_server_leaves_its_videos_alone_move(new: Callable[[], Policy]) -> None:
    policy = new()
    before = {video: policy.choose(video, IDLE) for video in VIDEOS}
    left = {server: 0 for server in SERVERS if server != SERVERS[2]}
    after = {video: policy.choose(video, left) for video in VIDEOS}
    assert {video for video in VIDEOS if after[video] != before[video]} == {
        video for video in VIDEOS if before[video] == SERVERS[2]
    }
    assert {video: policy.choose(video, IDLE) for video in VIDEOS} == before


def test_what_does_not_fit_at_its_home_goes_where_it_went_before() -> None:
    policy = WarmFirst(places=8, concurrency=4)
    full = {**IDLE, home("a", SERVERS) or "": 9}
    second = policy.choose("a", full)
    assert full[second] == 0
    third = policy.choose("a", {**full, second: 9})
    assert third not in (home("a", SERVERS), second)
    policy.choose("b", IDLE)
    assert policy.choose("a", {**full, second: 1}) == third  # both are warm, and this one has less to do
    assert policy.choose("a", {**full, third: 1}) == second


def test_a_server_that_was_asked_about_too_much_since_is_warm_no_more() -> None:
    def third(others: int) -> bool:
        policy = WarmFirst(places=2, concurrency=4)
        full = {**IDLE, home("a", SERVERS) or "": 9}
        second = policy.choose("a", full)
        third = policy.choose("a", {**full, second: 9})
        at_third = [video for video in VIDEOS if home(video, SERVERS) == third][:others]
        for video in at_third:
            policy.choose(video, IDLE)
        return policy.choose("a", full | {second: 1}) == third

    assert third(others=1)
    assert not third(others=2)


def test_a_server_that_was_away_is_not_warm() -> None:
    policy = WarmFirst(places=3000, concurrency=4)
    for video in VIDEOS:
        policy.choose(video, IDLE)
    full = {**IDLE, home("a", SERVERS) or "": 9}
    second = policy.choose("a", full)
    third = policy.choose("a", {**full, second: 9})
    assert policy.choose("a", {**full, third: 1}) == second
    policy.choose("b", {server: 0 for server in SERVERS if server != second})
    assert policy.choose("a", {**full, third: 1}) == third


def test_haproxys_homes_are_those_it_was_seen_to_choose() -> None:
    servers = ["one", "two", "three"]
    policy = HAProxyHash(servers)
    seen = "1222201211020222001011011000020211112110"
    assert (
        "".join(str(servers.index(policy.choose(f"video-{n}", dict.fromkeys(servers, 0)))) for n in range(40)) == seen
    )


def test_recent_names_are_those_named_last() -> None:
    recent = Recent(2)
    assert [recent.add(name) for name in "abacab"] == [False, False, True, False, True, False]
    assert ("a" in recent, "b" in recent, "c" in recent) == (True, True, False)
    assert recent.full
    assert not Recent(1).full
