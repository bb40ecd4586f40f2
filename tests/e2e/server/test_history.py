"""Servers of one catalog and one store, killed, stopped and cut off at random: what clients may never see."""

import asyncio
from collections import Counter

import pytest

from tests.soak.history.faults import KINDS
from tests.soak.history.run import run
from tests.support.postgres import temporary_postgres

SEEDS = range(11, 17)  # three of them, and more on a machine that is too slow to answer enough in three
SECONDS = 40
QUESTIONS = 300
DONE = ("upload 200", "ask 200", "content 200", "delete 200", "list 200", "look 200")
DONE += ("add key 200", "revoke key 200", "ask 401 invalid_api_key")


def test_whatever_happens_to_servers_workers_and_postgres_clients_see_nothing_wrong():
    counts = Counter()
    with temporary_postgres() as postgres:
        if postgres is None:
            pytest.skip("PostgreSQL is not installed")
        for number, seed in enumerate(SEEDS):
            if number >= 3 and counts["ask 200"] > QUESTIONS:
                break
            history = asyncio.run(run(SECONDS, seed, postgres))
            assert not history.violations, f"seed {seed}: {history.violations[:3]}"
            counts.update(history.counts)
    assert {name for name in (*DONE, *(f"fault {kind}" for kind in KINDS)) if not counts[name]} == set()
    assert counts["ask 200"] > QUESTIONS
