import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from f2l_vllm.catalog.catalog import QueueFull
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.store.adapter_info import AdapterInfo
from tests.support.catalog_steps import add, claim, publish


def test_files_of_the_same_bytes_share_one_job_and_one_adapter(catalog):
    first, second = add(catalog), add(catalog)
    assert catalog.counts()[1:] == (1, 0)
    adapter = publish(catalog)
    assert claim(catalog) is None
    states = catalog.states([first.id, second.id])
    assert set(states.values()) == {VideoState.PROCESSED}
    third = add(catalog)
    assert third.state is VideoState.PROCESSED
    assert catalog.adapter("f2l-1") == adapter


def test_an_id_that_no_database_could_hold_is_nobodys(catalog):
    record = add(catalog)
    assert catalog.file(f"{record.id}\0", "t") is None
    assert list(catalog.find([record.id, "file-\0"], "t")) == [record.id]
    assert catalog.remove_file("file-\0", "t") is None
    assert catalog.files("t", after=None, limit=9, descending=False, purpose="\0") == ([], False)
    with pytest.raises(KeyError):
        catalog.files("t", after="\0", limit=9, descending=False)
    named = add(catalog, filename="a\0b.mp4")
    assert catalog.file(named.id, "t").filename == named.filename == "a\ufffdb.mp4"


def test_a_file_that_joins_a_job_in_work_is_ready_with_it(catalog):
    first = add(catalog)
    job = claim(catalog)
    catalog.advance(job.adapter_name, VideoState.DECODING, 0.5)
    second = add(catalog)
    catalog.advance(job.adapter_name, VideoState.ENCODING, 0.5)
    third = add(catalog)
    catalog.advance(job.adapter_name, VideoState.PUBLISHING, 0.0)
    catalog.finish_job(job.adapter_name, rank=16, size=100, info=AdapterInfo())
    assert set(catalog.states([first.id, second.id, third.id]).values()) == {VideoState.PROCESSED}
    assert catalog.counts()[1:] == (0, 0)


def test_a_follower_of_uploads_sees_what_is_in_work_and_what_came_since(catalog):
    done = add(catalog)
    publish(catalog)
    waiting = add(catalog, adapter="f2l-2", sha="b")
    found, since = catalog.in_work("t", None, 9)
    assert found == {waiting.id: (VideoState.UPLOADED, 0.0)}
    fresh = add(catalog)  # ready at once
    assert fresh.state is VideoState.PROCESSED
    found, now = catalog.in_work("t", since, 9)
    assert set(found) == {waiting.id, fresh.id}
    assert set(catalog.in_work("t", now, 9)[0]) == {waiting.id}
    assert catalog.in_work("other", None, 9) == ({}, 0)
    assert done.id not in found


def test_the_queue_is_bounded_but_shared_bytes_need_no_room(catalog):
    add(catalog, limit=1)
    with pytest.raises(QueueFull) as error:
        add(catalog, adapter="f2l-2", sha="b", limit=1)
    assert error.value.retry_after >= 1
    assert len(catalog.files("t", after=None, limit=10, descending=True)[0]) == 1
    add(catalog, limit=1)  # the same bytes: no new job


def test_several_jobs_at_once_but_never_one_that_cost_a_worker(catalog):
    for index in range(4):
        add(catalog, adapter=f"f2l-{index}", sha=str(index))
    first = catalog.claim_jobs(2)
    assert [job.adapter_name for job in first] == ["f2l-0", "f2l-1"]
    catalog.release_job("f2l-0")
    assert [(job.adapter_name, job.attempts) for job in catalog.claim_jobs(8)] == [("f2l-0", 2)]
    catalog.release_job("f2l-1")
    assert [job.adapter_name for job in catalog.claim_jobs(8)] == ["f2l-1"]
    assert [job.adapter_name for job in catalog.claim_jobs(8)] == ["f2l-2", "f2l-3"]
    assert catalog.claim_jobs(8) == []


def test_an_interrupted_job_is_first_in_line_again(catalog):
    add(catalog, adapter="f2l-1", sha="a")
    add(catalog, adapter="f2l-2", sha="b")
    job = claim(catalog)
    catalog.advance(job.adapter_name, VideoState.DECODING, 0.5)
    catalog.release_job(job.adapter_name)
    again = claim(catalog)
    assert (again.adapter_name, again.attempts) == ("f2l-1", 2)


def test_a_restart_releases_every_running_job(catalog):
    record = add(catalog)
    claim(catalog)
    catalog.advance("f2l-1", VideoState.DECODING, 0.1)
    assert catalog.release_all_jobs(blameless=True) == 1
    assert catalog.file(record.id, "t").state is VideoState.UPLOADED
    assert claim(catalog).attempts == 1  # a stop is not the video's fault


def test_a_failed_job_tells_every_file_why(catalog):
    first, second = add(catalog), add(catalog)
    claim(catalog)
    catalog.advance("f2l-1", VideoState.DECODING, 0.0)
    catalog.fail_job("f2l-1", "truncated_video", "cut short")
    for record in (first, second):
        found = catalog.file(record.id, "t")
        assert (found.state, found.error_code, found.error_message) == ("error", "truncated_video", "cut short")
    assert not catalog.wanted("f2l-1")


def test_deleting_the_last_file_orphans_adapter_and_bytes(catalog):
    first, second = add(catalog), add(catalog)
    publish(catalog)
    removal = catalog.remove_file(first.id, "t")
    assert removal.orphaned_adapters == []
    assert not removal.orphaned_video
    removal = catalog.remove_file(second.id, "t")
    assert [adapter.name for adapter in removal.orphaned_adapters] == ["f2l-1"]
    assert removal.orphaned_video
    assert catalog.adapter("f2l-1") is None
    assert catalog.file(second.id, "t") is None
    assert catalog.remove_file(second.id, "t") is None


def test_deleting_while_queued_drops_the_job_and_while_running_drops_the_result(catalog):
    queued = add(catalog)
    catalog.remove_file(queued.id, "t")
    assert claim(catalog) is None
    running = add(catalog)
    claim(catalog)
    catalog.remove_file(running.id, "t")
    assert not catalog.wanted("f2l-1")
    assert catalog.finish_job("f2l-1", rank=1, size=1, info=AdapterInfo()) is None
    assert catalog.adapter("f2l-1") is None


def test_adapter_ids_are_never_used_again(catalog):
    record = add(catalog)
    first = publish(catalog)
    catalog.remove_file(record.id, "t")
    add(catalog)
    assert publish(catalog).id > first.id


def test_another_tenants_file_does_not_exist(catalog):
    record = add(catalog, tenant="one")
    assert catalog.file(record.id, "other") is None
    assert catalog.remove_file(record.id, "other") is None
    assert catalog.files("other", after=None, limit=10, descending=True) == ([], False)


def test_expired_files_are_gone_at_once_and_swept_later(catalog):
    record = add(catalog, expires_seconds=-1.0)
    assert catalog.file(record.id, "t") is None
    (removal,) = catalog.expire_files(time.time())
    assert removal.orphaned_video
    assert catalog.expire_files(time.time()) == []


def test_pages_follow_upload_order(catalog):
    ids = [add(catalog, adapter=f"f2l-{i}", sha=str(i)).id for i in range(5)]
    page, more = catalog.files("t", after=None, limit=2, descending=True)
    assert ([r.id for r in page], more) == ([ids[4], ids[3]], True)
    page, more = catalog.files("t", after=ids[3], limit=10, descending=True)
    assert ([r.id for r in page], more) == ([ids[2], ids[1], ids[0]], False)
    page, _ = catalog.files("t", after=ids[3], limit=10, descending=False)
    assert [r.id for r in page] == [ids[4]]
    with pytest.raises(KeyError):
        catalog.files("t", after="file-unknown", limit=1, descending=True)


def test_adapters_of_more_files_than_a_query_takes(catalog, monkeypatch):
    monkeypatch.setattr("f2l_vllm.catalog.adapters._PARAMETERS", 5)
    records = [add(catalog, adapter=f"f2l-{i}", sha="a", limit=20) for i in range(12)]
    assert catalog.adapters_of(records) == {}
    for _ in range(3):
        publish_next(catalog)
    page, _ = catalog.files("t", after=None, limit=2000, descending=False)
    assert sorted(catalog.adapters_of(page)) == ["f2l-0", "f2l-1", "f2l-2"]


def publish_next(catalog):
    name = claim(catalog).adapter_name
    catalog.advance(name, VideoState.PUBLISHING, 0.0)
    catalog.finish_job(name, rank=16, size=100, info=AdapterInfo())


def test_a_damaged_adapter_sends_its_files_back_to_work(catalog):
    record = add(catalog)
    adapter = publish(catalog)
    catalog.forget_adapter(adapter)
    assert catalog.adapter("f2l-1") is None
    assert catalog.file(record.id, "t").state is VideoState.UPLOADED
    assert publish(catalog) is not None
    catalog.forget_adapter(adapter)  # a late witness of the old damage
    assert catalog.adapter("f2l-1") is not None


def test_each_job_is_claimed_once_by_many_threads(catalog):
    for index in range(40):
        add(catalog, adapter=f"f2l-{index}", sha=f"{index % 10}", limit=100)

    def take_all(_number):
        return [job.adapter_name for job in iter(lambda: claim(catalog), None)]

    with ThreadPoolExecutor(8) as threads:
        claimed = [name for names in threads.map(take_all, range(8)) for name in names]
    assert sorted(claimed) == sorted(f"f2l-{index}" for index in range(40))
