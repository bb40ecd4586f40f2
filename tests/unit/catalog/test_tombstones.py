"""Generations and tombstones: what may be named, what may be removed, and that the two never meet."""

import time

import pytest
from sqlalchemy import text

from f2l_vllm.catalog.catalog import Catalog, QuotaExceeded
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tombstones import VideoGone
from f2l_vllm.store.adapter_info import AdapterInfo
from tests.support.catalog_steps import add, claim, publish

A = "a" * 64


def objects(catalog):
    return [one.object for one in catalog.tombstones(100)]


def test_files_of_the_same_bytes_name_one_copy_which_goes_with_the_last(catalog):
    fresh = catalog.reserve_video(A)
    assert fresh.is_new
    first = add(catalog, video=fresh)
    shared = catalog.reserve_video(A)
    assert (shared.is_new, shared.video) == (False, fresh.video)
    second = add(catalog, video=shared)
    assert first.video == second.video == fresh.video
    assert not catalog.remove_file(first.id, "t").orphaned_video
    assert objects(catalog) == []
    (doomed,) = (one for one in catalog.remove_file(second.id, "t").doomed if one.is_video)
    assert doomed.object == fresh.video
    assert objects(catalog) == [fresh.video]
    catalog.bury([doomed])
    assert objects(catalog) == []
    assert catalog.purge(time.time() + 1) == 2


def test_bytes_that_were_deleted_are_never_named_again(catalog):
    record = add(catalog, video=catalog.reserve_video(A))
    counted_on = catalog.reserve_video(A)
    catalog.remove_file(record.id, "t")
    with pytest.raises(VideoGone):
        add(catalog, video=counted_on)
    again = catalog.reserve_video(A)
    assert again.is_new
    assert again.video != record.video
    assert add(catalog, video=again).video == again.video
    with pytest.raises(VideoGone):
        add(catalog, video=counted_on)


def test_of_two_uploads_at_once_one_copy_is_named_and_the_other_goes(catalog):
    one, other = catalog.reserve_video(A), catalog.reserve_video(A)
    assert one.video != other.video
    assert catalog.named([one.video, other.video]) == {one.video, other.video}  # no sweep takes them meanwhile
    assert add(catalog, video=one).video == add(catalog, video=other).video == one.video
    assert objects(catalog) == [other.video]
    assert catalog.named([one.video, other.video]) == {one.video}


def test_an_upload_that_was_refused_leaves_a_tombstone_unless_its_file_is_there_after_all(catalog):
    refused, entered = catalog.reserve_video(A), catalog.reserve_video("b" * 64)
    add(catalog, video=entered, adapter="f2l-b", sha="b")
    assert catalog.give_back_video(entered) == []
    assert [one.object for one in catalog.give_back_video(refused)] == objects(catalog) == [refused.video]
    with pytest.raises(VideoGone):
        add(catalog, video=refused)


def test_a_reservation_that_nobody_came_back_for_becomes_a_tombstone(catalog):
    kept, late = catalog.reserve_video(A), catalog.reserve_video("b" * 64)
    with catalog._write() as connection:
        query = text("UPDATE tombstones SET doomed_at = doomed_at - 7200 WHERE name = :name")
        connection.execute(query, {"name": late.sha256})
    assert objects(catalog) == [late.video]
    with pytest.raises(VideoGone):
        add(catalog, video=late, sha="b")
    assert add(catalog, video=kept).video == kept.video


def test_bytes_that_are_missing_are_replaced_for_all_files_that_name_them(catalog):
    first = add(catalog, video=catalog.reserve_video(A))
    better = catalog.reserve_video(A, anew=True, replaces=first.generation)
    second = add(catalog, video=better)
    assert catalog.file(first.id, "t").video == second.video == better.video
    assert objects(catalog) == [first.video]


def test_a_worker_that_finds_no_bytes_fails_only_the_copy_it_looked_for(catalog):
    first = add(catalog, video=catalog.reserve_video(A))
    job = claim(catalog)
    assert job.video == first.video
    second = add(catalog, video=catalog.reserve_video(A, anew=True, replaces=first.generation))
    catalog.fail_job("f2l-1", "video_lost", "missing", generation=job.generation)
    again = claim(catalog)
    assert (again.video, again.attempts) == (second.video, 1)
    catalog.fail_job("f2l-1", "video_lost", "missing", generation=again.generation)
    assert catalog.file(first.id, "t").error_code == "video_lost"
    healing = catalog.reserve_video(A)  # the next upload does not count on it
    assert (healing.is_new, healing.replaces) == (True, second.generation)


def test_adapters_and_their_compositions_leave_tombstones(catalog):
    record = add(catalog, video=catalog.reserve_video(A))
    publish(catalog)
    catalog.add_composed("f2l-c", ["f2l-1"], rank=32, size=1, info=AdapterInfo())
    catalog.remove_file(record.id, "t")
    assert sorted(objects(catalog)) == sorted(["f2l-1", "f2l-c", record.video])


@pytest.mark.parametrize("end", ["finish", "release", "fail"])
def test_what_a_worker_made_for_nobody_leaves_a_tombstone(catalog, end):
    record = add(catalog)
    job = claim(catalog)
    catalog.remove_file(record.id, "t")
    catalog.bury(catalog.tombstones(100))
    if end == "finish":
        assert catalog.finish_job("f2l-1", rank=1, size=1, info=AdapterInfo(), token=job.token) is None
    elif end == "release":
        catalog.release_job("f2l-1", token=job.token)
    else:
        catalog.fail_job("f2l-1", "code", "message", token=job.token)
    assert set(objects(catalog)) == {job.object}  # once for the file and once for the attempt


def test_an_attempt_that_was_given_up_changes_nothing_more(catalog):
    record = add(catalog)
    first = claim(catalog)
    catalog.release_job("f2l-1", token=first.token)
    assert objects(catalog) == [first.object]  # it may have put it there
    second = claim(catalog)
    assert second.object != first.object
    late = {"token": first.token}
    catalog.advance("f2l-1", VideoState.PUBLISHING, 0.5, **late)
    catalog.fail_job("f2l-1", "code", "message", **late)
    catalog.release_job("f2l-1", **late)
    assert catalog.finish_job("f2l-1", rank=1, size=1, info=AdapterInfo(), **late) is None
    assert catalog.file(record.id, "t").state is VideoState.UPLOADED
    assert catalog.named({first.object, second.object}) == {second.object}
    adapter = catalog.finish_job("f2l-1", rank=1, size=1, info=AdapterInfo(), token=second.token)
    assert adapter.object == second.object
    assert catalog.finish_job("f2l-1", rank=1, size=1, info=AdapterInfo(), **late) is None
    assert catalog.named({first.object, second.object, "f2l-1"}) == {second.object}
    assert catalog.refers_to(second.object)
    assert not catalog.refers_to(first.object)
    assert not catalog.refers_to("f2l-1")


@pytest.mark.parametrize("end", ["fail", "ids", "adopt"])
def test_what_an_attempt_left_is_removed_however_it_ended(catalog, end, monkeypatch):
    add(catalog)
    job = claim(catalog)
    if end == "fail":
        catalog.fail_job("f2l-1", "code", "message", token=job.token)
    elif end == "ids":
        monkeypatch.setattr("f2l_vllm.catalog.transactions.LAST_ID", 0)
        assert catalog.finish_job("f2l-1", rank=1, size=1, info=AdapterInfo(), token=job.token) is None
    else:
        catalog.adopt(lambda sha256: "f2l-2", lambda video: True)
    assert objects(catalog) == [job.object]


def test_what_a_running_attempt_may_still_make_is_not_erased(catalog):
    record = add(catalog)
    job = claim(catalog)
    doomed = catalog.remove_file(record.id, "t").doomed
    numbers = [one.seq for one in doomed]
    assert job.object in {one.object for one in doomed}
    catalog.bury(doomed)
    assert not catalog.is_erased(numbers)
    assert objects(catalog) == [job.object]
    catalog.release_job("f2l-1", token=job.token)
    catalog.bury(catalog.tombstones(100))
    assert catalog.is_erased(numbers)


@pytest.mark.parametrize("last", ["late", "later"])
def test_what_a_late_attempt_left_is_removed_when_either_attempt_ends(catalog, last):
    add(catalog)
    late = claim(catalog)
    catalog.release_job("f2l-1")
    catalog.bury(catalog.tombstones(100))  # and now it puts its adapter into the store
    assert not catalog.wanted("f2l-1", token=late.token)
    later = claim(catalog)
    assert catalog.wanted("f2l-1", token=later.token)
    ends = {"late": late, "later": later}
    finished = catalog.finish_job("f2l-1", rank=1, size=1, info=AdapterInfo(), token=ends[last].token)
    assert (finished is None) == (last == "late")
    assert objects(catalog) == [late.object]


def test_an_adapter_that_is_made_again_is_another_copy(catalog):
    add(catalog)
    job = claim(catalog)
    adapter = catalog.finish_job("f2l-1", rank=1, size=1, info=AdapterInfo(), token=job.token)
    catalog.forget_adapter(adapter)
    assert objects(catalog) == [job.object]
    job = claim(catalog)
    again = catalog.finish_job("f2l-1", rank=1, size=1, info=AdapterInfo(), token=job.token)
    assert (again.name, again.object != adapter.object) == (adapter.name, True)


def test_expiry_ends_some_at_a_time_and_leaves_tombstones(catalog):
    records = [add(catalog, f"f2l-{i}", str(i), expires_seconds=-1.0, limit=99) for i in range(5)]
    assert len(catalog.expire_files(time.time(), 3)) == 3
    assert len(catalog.expire_files(time.time(), 3)) == 2
    assert sorted(objects(catalog)) == sorted(record.video for record in records)


def test_a_duty_is_one_processs_at_a_time(database_url):
    one, other = Catalog(database_url), Catalog(database_url)
    assert one.is_due("sweep", 100)
    assert not other.is_due("sweep", 100)
    assert other.is_due("sweep", 0)
    one.close()
    other.close()


def test_bytes_of_a_tenant_are_counted_as_files_come_and_go(catalog):
    first = add(catalog, tenant_bytes=7)
    add(catalog, tenant="other", tenant_bytes=7)
    second = add(catalog, "f2l-2", "b", tenant_bytes=7, expires_seconds=-1.0)
    with pytest.raises(QuotaExceeded, match="are taken"):
        add(catalog, "f2l-3", "c", tenant_bytes=7)
    assert (catalog.stored_bytes("t"), catalog.stored_bytes()) == (6, 9)
    catalog.expire_files(time.time())
    catalog.remove_file(first.id, "t")
    assert catalog.stored_bytes("t") == 0
    assert add(catalog, "f2l-3", "c", tenant_bytes=7).state is VideoState.UPLOADED
    assert second.bytes == 3


def test_what_was_deleted_is_counted_until_it_is_gone_from_the_store(catalog):
    assert catalog.leftovers() == (0, 0.0)
    record = add(catalog, video=catalog.reserve_video(A))
    catalog.reserve_video("b" * 64)  # an upload that still runs
    assert catalog.leftovers()[0] == 0
    doomed = catalog.remove_file(record.id, "t").doomed
    with catalog._write() as connection:
        connection.execute(text("UPDATE tombstones SET doomed_at = doomed_at - 100"))
    count, seconds = catalog.leftovers()
    assert count == len(doomed)
    assert 100 <= seconds < 160
    catalog.bury(doomed)
    assert catalog.leftovers() == (0, 0.0)
