"""Each name has a home, and few get another when servers come and go."""

from __future__ import annotations

from collections import Counter

from f2l_vllm.rendezvous import home, order

SERVERS = tuple(f"server-{number}" for number in range(8))
NAMES = [f"f2l-{number}" for number in range(2000)]


def test_few_names_move_when_a_server_comes_or_goes() -> None:
    before = {name: home(name, SERVERS) for name in NAMES}
    assert min(Counter(before.values()).values()) > 150
    after = {name: home(name, SERVERS[:-1]) for name in NAMES}
    assert {name for name in NAMES if after[name] != before[name]} == {n for n in NAMES if before[n] == SERVERS[-1]}


def test_the_order_begins_with_the_home_and_has_the_next_home_behind_it() -> None:
    for name in NAMES:
        ordered = order(name, SERVERS)
        assert sorted(ordered) == sorted(SERVERS)
        left = SERVERS
        for server in ordered:
            assert home(name, left) == server
            left = tuple(other for other in left if other != server)


def test_homes_stay_where_they_are_over_versions() -> None:
    assert [home(name, SERVERS[:3]) for name in NAMES[:6]] == [f"server-{number}" for number in (2, 1, 2, 2, 1, 0)]


def test_without_servers_there_is_no_home() -> None:
    assert home("a", []) is None
