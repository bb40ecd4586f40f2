"""How many workers the queue asks for, with a real catalog and without Ray."""

import math
from types import SimpleNamespace

import pytest

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.cluster import scaling
from f2l_vllm.cluster.scaling import QueuePolicy
from tests.support.catalog_steps import add


@pytest.fixture
def catalog(database_url, monkeypatch):
    monkeypatch.setenv("F2L_DATABASE_URL", database_url)
    catalog = Catalog(database_url)
    yield catalog
    catalog.close()


def decided(policy, target=1):
    """What it says once it has looked at the queue as it is now."""
    context = SimpleNamespace(target_num_replicas=target)
    policy(context)
    for _ in range(2):  # the first look may have begun before
        policy._look.result()
        replicas, why = policy(context)
    return replicas, why


def test_workers_come_with_waiting_videos_and_stay_with_their_own(catalog):
    policy = QueuePolicy(videos_per_worker=2, seconds=0.0)
    assert decided(policy) == (0, {"waiting": 0, "running": 0})
    for number in range(5):
        add(catalog, f"f2l-{number}", sha=str(number))
    assert decided(policy) == (3, {"waiting": 5, "running": 0})
    claimed = catalog.claim_jobs(3)
    assert decided(policy) == (3, {"waiting": 2, "running": 3})
    claimed += catalog.claim_jobs(1)
    for job in claimed[:1]:
        catalog.fail_job(job.adapter_name, "code", "message")
    assert decided(policy) == (3, {"waiting": 1, "running": 3})  # none at work is stopped
    catalog.claim_jobs(1)
    assert decided(policy) == (4, {"waiting": 0, "running": 4})
    for job in claimed[1:]:
        catalog.fail_job(job.adapter_name, "code", "message")
    assert decided(policy) == (1, {"waiting": 0, "running": 1})


def test_nothing_changes_while_the_catalog_cannot_be_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("F2L_DATABASE_URL", "postgresql://f2l@127.0.0.1:1/none")
    policy, context = QueuePolicy(), SimpleNamespace(target_num_replicas=7)
    assert policy(context) == (7, {})
    with pytest.raises(Exception, match="refused"):
        policy._look.result()
    assert policy(context) == (7, {})


def test_a_queue_that_was_counted_long_ago_does_not_count(catalog):
    policy = QueuePolicy(seconds=0.0)
    assert decided(policy, target=5)[0] == 0
    policy._look, policy._looked_at = None, math.inf  # as if the next look took for ever
    policy._known_at -= scaling._KNOWN_SECONDS
    assert policy(SimpleNamespace(target_num_replicas=5)) == (5, {})
