"""What outlives a question: pinning, use, expiry, compositions, other revisions, ids; in both databases."""

import time

import pytest
from sqlalchemy import text

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.transactions import LAST_ID
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.errors import AdapterIdsExhausted
from tests.support.catalog_steps import add, claim, publish


def names(records):
    return sorted(record.name for record in records)


def test_a_pinned_file_outlives_its_time_until_it_is_let_go(catalog):
    record = add(catalog, expires_seconds=-1.0, pinned=True)
    assert catalog.pin_file(record.id, "t", True).pinned
    assert catalog.expire_files(time.time()) == []
    assert catalog.file(record.id, "t").pinned
    assert len(catalog.files("t", after=None, limit=9, descending=True)[0]) == 1
    assert catalog.pin_file(record.id, "other", False) is None
    assert not catalog.pin_file(record.id, "t", False).pinned
    assert catalog.file(record.id, "t") is None
    assert catalog.pin_file(record.id, "t", True) is None
    (removal,) = catalog.expire_files(time.time())
    assert removal.file.id == record.id


def test_what_expires_by_disuse_lives_on_with_each_use(catalog):
    now = time.time()
    idle = add(catalog, expires_seconds=100.0, idle_seconds=100)
    fixed = add(catalog, expires_seconds=100.0)
    assert fixed.expires_at == fixed.created_at + 100
    catalog.touch({idle.id: now + 50, fixed.id: now + 50}, {})
    assert catalog.file(idle.id, "t").expires_at == pytest.approx(now + 150)
    assert catalog.file(fixed.id, "t").expires_at == pytest.approx(now + 100)
    assert catalog.file(fixed.id, "t").last_used_at == pytest.approx(now + 50)
    assert [removal.file.id for removal in catalog.expire_files(now + 120)] == [fixed.id]
    assert [removal.file.id for removal in catalog.expire_files(now + 160)] == [idle.id]


def test_the_adapters_used_last_come_first_after_the_pinned(catalog):
    now = time.time()
    for index in range(4):
        add(catalog, adapter=f"f2l-{index}", sha=str(index), pinned=index == 0)
        publish(catalog, f"f2l-{index}")
    add(catalog, adapter="f2l-waits", sha="w")
    catalog.touch({}, {"f2l-1": now + 20, "f2l-3": now + 10})
    assert [adapter.name for adapter in catalog.recent_adapters(3)] == ["f2l-0", "f2l-1", "f2l-3"]
    assert catalog.pinned_adapters() == {"f2l-0"}
    assert catalog.videos_in_work() == {"w" * 64}


def test_rows_of_files_that_are_gone_are_purged_and_no_others(catalog):
    kept, gone = add(catalog), add(catalog)
    catalog.remove_file(gone.id, "t")
    assert catalog.purge(time.time() - 60) == 0
    assert catalog.states([gone.id]) == {gone.id: VideoState.DELETED}
    assert catalog.purge(time.time() + 1) == 1
    assert catalog.states([kept.id, gone.id]) == {kept.id: VideoState.UPLOADED}


def compose(catalog, name, *made_of):
    return catalog.add_composed(name, made_of, rank=32, size=9, info=AdapterInfo(visual_tokens=len(made_of)))


def test_a_composed_adapter_leaves_with_the_first_of_its_parts(catalog):
    first, second, third = (add(catalog, adapter=f"f2l-{i}", sha=str(i)) for i in range(3))
    for index in range(3):
        publish(catalog, f"f2l-{index}")
    pair = compose(catalog, "f2l-pair", "f2l-0", "f2l-1", "f2l-0")
    assert pair.composed
    assert compose(catalog, "f2l-pair", "f2l-0", "f2l-1") == pair
    compose(catalog, "f2l-all", "f2l-pair", "f2l-2")
    assert compose(catalog, "f2l-none", "f2l-0", "f2l-gone") is None
    assert catalog.wanted("f2l-pair")
    assert names(catalog.remove_file(first.id, "t").orphaned_adapters) == ["f2l-0", "f2l-all", "f2l-pair"]
    assert not catalog.wanted("f2l-pair")
    assert compose(catalog, "f2l-pair", "f2l-0", "f2l-1") is None
    assert names(catalog.remove_file(second.id, "t").orphaned_adapters) == ["f2l-1"]
    assert names(catalog.remove_file(third.id, "t").orphaned_adapters) == ["f2l-2"]


def test_compositions_are_bounded_by_use(catalog):
    add(catalog)
    publish(catalog)
    for index in range(4):
        compose(catalog, f"f2l-c{index}", "f2l-1")
    catalog.touch({}, {"f2l-c0": time.time() + 10})
    assert names(catalog.oldest_composed(2)) == ["f2l-c1", "f2l-c2"]
    assert catalog.oldest_composed(4) == []
    assert names(catalog.remove_composed("f2l-c1")) == ["f2l-c1"]
    assert catalog.remove_composed("f2l-c1") == catalog.remove_composed("f2l-1") == []
    assert catalog.drop_abandoned() == []
    assert catalog.adapter("f2l-c0") is not None


def test_a_damaged_part_keeps_its_compositions_and_a_damaged_composition_is_forgotten(catalog):
    record = add(catalog)
    part = publish(catalog)
    composed = compose(catalog, "f2l-c", "f2l-1")
    catalog.forget_adapter(composed)
    assert catalog.adapter("f2l-c") is None
    assert catalog.file(record.id, "t").state is VideoState.PROCESSED
    compose(catalog, "f2l-c", "f2l-1")
    catalog.forget_adapter(part)
    assert catalog.adapter("f2l-c") is not None
    assert names(catalog.remove_file(record.id, "t").orphaned_adapters) == ["f2l-c"]


def test_ids_end_before_they_leave_int32_and_say_so(catalog):
    record = add(catalog)
    publish(catalog)
    with catalog._write() as connection:
        if connection.dialect.name == "sqlite":
            connection.execute(
                text("UPDATE sqlite_sequence SET seq = :id WHERE name = 'adapters'"), {"id": LAST_ID - 1}
            )
        else:
            connection.execute(text("SELECT setval('adapters_id_seq', :id)"), {"id": LAST_ID - 1})
    add(catalog, adapter="f2l-2", sha="b")
    assert publish(catalog, "f2l-2").id == LAST_ID
    late = add(catalog, adapter="f2l-3", sha="c")
    assert publish(catalog, "f2l-3") is None
    assert catalog.file(late.id, "t").error_code == "adapter_ids_exhausted"
    assert not catalog.wanted("f2l-3")
    with pytest.raises(AdapterIdsExhausted, match="start with a new one"):
        compose(catalog, "f2l-c", "f2l-1")
    assert catalog.adapter("f2l-c") is None
    assert catalog.file(record.id, "t").state is VideoState.PROCESSED


def other(sha256):
    return f"f2l-other-{sha256[0]}"


def test_files_of_other_revisions_are_made_again_and_never_answered_from_the_old(catalog):
    ready, waiting = add(catalog), add(catalog, adapter="f2l-2", sha="b")
    publish(catalog)
    catalog.touch({ready.id: time.time() + 10}, {})
    assert catalog.adopt(other, lambda _sha256: True) == (2, 0)
    for record in (ready, waiting):
        found = catalog.file(record.id, "t")
        assert (found.state, found.adapter_name) == (VideoState.UPLOADED, other(record.sha256))
    assert catalog.adopt(other, lambda _sha256: True) == (0, 0)
    assert catalog.counts()[1:] == (2, 0)  # the job of the old name is gone
    assert catalog.drop_abandoned() == []  # kept until its successor is made
    assert catalog.recent_adapters(9) == []
    publish(catalog, other("a"))
    assert names(catalog.drop_abandoned()) == ["f2l-1"]
    assert catalog.file(ready.id, "t").state is VideoState.PROCESSED


def test_a_start_with_the_wrong_models_loses_nothing(catalog):
    right = {"a": "f2l-1", "b": "f2l-2"}
    first, second = add(catalog), add(catalog, adapter="f2l-2", sha="b")
    publish(catalog)
    publish(catalog, "f2l-2")
    assert catalog.adopt(other, lambda sha256: sha256[0] == "a") == (1, 1)
    lost = catalog.file(second.id, "t")
    assert (lost.state, lost.error_code) == (VideoState.ERROR, "adapter_of_other_revision")
    assert catalog.adopt(lambda sha256: right[sha256[0]], lambda _sha256: True) == (0, 0)
    for record in (first, second):
        found = catalog.file(record.id, "t")
        assert (found.state, found.adapter_name, found.error_code) == (
            VideoState.PROCESSED,
            right[record.sha256[0]],
            None,
        )
    assert claim(catalog) is None
    assert catalog.drop_abandoned() == []


def test_a_file_deleted_while_it_is_made_again_takes_its_old_adapter_along(catalog):
    record = add(catalog)
    publish(catalog)
    catalog.adopt(other, lambda _sha256: True)
    assert names(catalog.remove_file(record.id, "t").orphaned_adapters) == ["f2l-1"]
    assert claim(catalog) is None


def test_what_is_made_again_waits_behind_uploads_and_takes_no_place_in_their_queue(catalog):
    add(catalog)
    publish(catalog)
    add(catalog, adapter="f2l-2", sha="b")
    publish(catalog, "f2l-2")
    catalog.adopt(other, lambda _sha256: True)
    add(catalog, adapter="f2l-new", sha="n", limit=1)
    catalog.hurry_job(other("b"))  # somebody asks about it
    order = [job.adapter_name for job in catalog.claim_jobs(9)]
    assert order == [other("b"), "f2l-new", other("a")]
