"""Who is served next, who may wait, and what is not tried again: the queue in the catalog, without workers."""

import pytest

from f2l_vllm.catalog.catalog import Catalog, QueueFull
from f2l_vllm.catalog.jobs import EXHAUSTED
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Upload


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    yield catalog
    catalog.close()


def add(catalog, tenant, name, **limits):
    return catalog.add_file(Upload(tenant, name, 1, name, "vision"), name, **{"queue_limit": 1000, **limits})


def served(catalog, count, batch=1):
    names = []
    while len(names) < count:
        jobs = catalog.claim_jobs(batch)
        assert 0 < len(jobs) <= batch
        for job in jobs:
            names.append(job.adapter_name)
            catalog.fail_job(job.adapter_name, "x", "x")
    return names


def test_tenants_take_turns_however_many_videos_one_of_them_sends(catalog):
    for i in range(20):
        add(catalog, "a", f"a{i}")
    for i in range(3):
        add(catalog, "b", f"b{i}")
    assert served(catalog, 6) == ["a0", "b0", "a1", "b1", "a2", "b2"]
    add(catalog, "c", "c0")
    add(catalog, "b", "b3")
    assert served(catalog, 5) == ["c0", "a3", "b3", "a4", "a5"]


def test_a_batch_is_shared_too(catalog):
    for name in ("a0", "a1", "a2", "a3", "b0", "b1"):
        add(catalog, name[0], name)
    assert served(catalog, 6, batch=4) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_jobs_in_work_at_the_same_time_are_shared(catalog):
    for name in ("a0", "a1", "a2", "b0"):
        add(catalog, name[0], name)
    assert [catalog.claim_jobs(1)[0].adapter_name for _ in range(4)] == ["a0", "b0", "a1", "a2"]
    assert catalog.claim_jobs(1) == []


def test_a_video_of_several_tenants_comes_when_the_first_of_them_has_its_turn(catalog):
    for name in ("a0", "a1", "a2"):
        add(catalog, "a", name)
    add(catalog, "b", "a2")
    assert served(catalog, 3) == ["a0", "a2", "a1"]


def test_one_tenant_fills_its_share_of_the_queue_and_no_more(catalog):
    limits = {"queue_limit": 5, "tenant_limit": 3}
    for i in range(3):
        add(catalog, "a", f"a{i}", **limits)
    with pytest.raises(QueueFull):
        add(catalog, "a", "a3", **limits)
    add(catalog, "a", "a2", **limits)  # the same bytes need no room
    add(catalog, "b", "b0", **limits)
    add(catalog, "b", "a0", **limits)
    add(catalog, "c", "c0", **limits)
    with pytest.raises(QueueFull):
        add(catalog, "c", "c1", **limits)  # the whole queue is full
    served(catalog, 1)
    add(catalog, "c", "c1", **limits)


def test_a_video_that_cost_all_its_attempts_gets_one_more_per_upload(catalog):
    first = add(catalog, "a", "poison", job_attempts=3)
    for _ in range(2):
        assert catalog.claim_jobs(1)[0].attempts in (1, 2)
        catalog.release_job("poison")
    assert catalog.claim_jobs(1)[0].attempts == 3
    catalog.fail_job("poison", EXHAUSTED, "three workers")
    assert catalog.claim_jobs(1) == []
    for upload in range(2):
        again = add(catalog, "b", "poison", job_attempts=3)
        (job,) = catalog.claim_jobs(1)
        assert job.attempts == 3  # the last one at once
        catalog.fail_job("poison", EXHAUSTED, "and another")
        assert catalog.file(again.id, "b").state is VideoState.ERROR
        if not upload:
            catalog.remove_file(first.id, "a")  # deleting it does not make it forgotten
    add(catalog, "b", "harmless", job_attempts=3)
    assert catalog.claim_jobs(1)[0].attempts == 1


def test_an_attempt_counts_unless_the_pool_stopped_in_order(catalog):
    add(catalog, "a", "video")
    for blameless, expected in ((True, 1), (False, 1), (False, 2), (True, 3)):
        assert catalog.claim_jobs(1)[0].attempts == expected
        assert catalog.release_all_jobs(blameless=blameless) == 1
    assert catalog.claim_jobs(1)[0].attempts == 3


def test_a_job_that_is_given_back_goes_if_nobody_waits_for_it(catalog):
    record = add(catalog, "a", "video")
    for give_back in (lambda: catalog.release_job("video"), lambda: catalog.release_all_jobs(blameless=False)):
        catalog.claim_jobs(1)
        catalog.remove_file(record.id, "a")
        assert catalog.counts()[1:] == (0, 1)
        give_back()
        assert catalog.counts()[1:] == (0, 0)
        record = add(catalog, "a", "video")
    catalog.claim_jobs(1)
    catalog.release_job("video")
    assert catalog.counts()[1:] == (1, 0)
