"""Batches and their answers in both databases, and files that are no videos."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update

from f2l_vllm.catalog.batch_tables import TRANSITIONS, BatchState, answers, batches
from f2l_vllm.catalog.batches import TooManyBatches, duty
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.tables import duties
from tests.support.catalog_steps import add

S = BatchState


def new(catalog, tenant="t", limit=9):
    return catalog.add_batch(tenant, "/v1/responses", "file-1", seconds=60, limit=limit, details={"metadata": None})


def asking(catalog):
    return catalog.move_batch(new(catalog), S.IN_PROGRESS, total=2)


def test_a_line_has_one_answer_and_none_after_the_last_state_that_asks(catalog):
    batch = asking(catalog)
    assert catalog.add_answer(batch, 7, "b\n", is_success=True)
    assert not catalog.add_answer(batch, 7, "other\n", is_success=False)
    assert catalog.add_answer(batch, 3, "a\n", is_success=True)
    assert catalog.add_answer(batch, 5, "c\n", is_success=False)
    batch = catalog.move_batch(batch, S.FINALIZING, outcome="completed")
    assert not catalog.add_answer(batch, 9, "late\n", is_success=True)
    assert (batch.total, batch.completed, batch.failed) == (2, 2, 1)
    assert catalog.answered(batch) == {3, 5, 7}
    assert catalog.answers(batch, is_success=True, after=0, limit=9) == [(3, "a\n"), (7, "b\n")]
    assert catalog.answers(batch, is_success=True, after=3, limit=1) == [(7, "b\n")]
    assert catalog.answers(batch, is_success=False, after=0, limit=9) == [(5, "c\n")]


def test_servers_that_answer_the_same_lines_at_once_keep_one_answer_each(database_url):
    one, two = Catalog(database_url), Catalog(database_url)
    batch, begin = asking(one), threading.Barrier(2)

    def answer(catalog):
        begin.wait()
        return sum(catalog.add_answer(batch, line, "x\n", is_success=True) for line in range(40))

    with ThreadPoolExecutor(2) as threads:
        assert sum(threads.map(answer, (one, two))) == 40
    assert one.batch(batch.id, "t").completed == 40
    one.close()
    two.close()


def test_states_follow_the_state_machine_and_an_end_leaves_the_batch_alone(catalog):
    batch = asking(catalog)
    assert catalog.move_batch(batch, S.COMPLETED).state is S.IN_PROGRESS
    assert catalog.hold_duty(duty(batch), "here")
    catalog.add_answer(batch, 1, "x\n", is_success=True)
    assert catalog.move_batch(batch, S.CANCELLING).state is S.CANCELLING
    batch = catalog.move_batch(batch, S.CANCELLED, output_file_id="file-2")
    assert batch.details["output_file_id"] == "file-2"
    assert batch.details["in_progress_at"] <= batch.details["cancelling_at"] <= batch.details["cancelled_at"]
    assert batch.ended_at is not None
    with catalog._read() as connection:
        assert connection.scalar(select(answers.c.line)) is None
        assert connection.scalar(select(duties.c.name)) is None
    for state in BatchState:
        assert catalog.move_batch(batch, state).state is S.CANCELLED
    assert catalog.open_batches() == []
    assert set(TRANSITIONS) | {target for targets in TRANSITIONS.values() for target in targets} == set(BatchState)


def test_a_tenant_has_its_own_batches_a_page_at_a_time_and_so_many_open_ones(catalog):
    mine = [new(catalog, limit=3) for _ in range(3)]
    theirs = new(catalog, "other", limit=3)
    with pytest.raises(TooManyBatches):
        new(catalog, limit=3)
    assert catalog.batch(theirs.id, "t") is None
    assert catalog.batch(mine[0].id, "t") == mine[0]
    page, more = catalog.batches("t", after=None, limit=2)
    assert ([one.id for one in page], more) == ([mine[2].id, mine[1].id], True)
    assert catalog.batches("t", after=page[-1].id, limit=2) == ([mine[0]], False)
    with pytest.raises(KeyError):
        catalog.batches("t", after=theirs.id, limit=2)
    assert [one.id for one in catalog.open_batches()] == [one.id for one in (*mine, theirs)]
    catalog.move_batch(mine[0], S.FAILED)
    assert new(catalog, limit=3).state is S.VALIDATING


def test_batches_that_ended_long_ago_are_forgotten(catalog):
    old, late, still = new(catalog), new(catalog), new(catalog)
    for batch in (old, late):
        catalog.move_batch(batch, S.FAILED)
    with catalog._write() as connection:
        connection.execute(update(batches).where(batches.c.id == old.id).values(ended_at=time.time() - 31 * 86400))
    assert catalog.purge_batches() == 1
    assert [one.id for one in catalog.batches("t", after=None, limit=9)[0]] == [still.id, late.id]


def test_a_document_is_a_file_of_its_tenant_and_no_video(catalog):
    document = add(catalog, "", "d", purpose="batch", limit=0)  # no job, so no place in the queue
    assert document.is_document
    assert document.state.value == "processed"
    video = add(catalog, "f2l-1", "a")
    assert not video.is_document
    assert catalog.claim_jobs(9)[0].adapter_name == "f2l-1"
    assert [one.id for one in catalog.files("t", after=None, limit=9, descending=False)[0]] == [document.id, video.id]
    assert catalog.files("t", after=None, limit=9, descending=False, state=document.state) == ([], False)
    assert catalog.in_work("t", 0, 9)[0].keys() == {video.id}
    assert catalog.counts()[0] == {"uploaded": 1}
    assert catalog.adopt(lambda sha256: f"f2l-new-{sha256[0]}", lambda _video: True) == (1, 0)  # the video
    assert catalog.file(document.id, "t").adapter_name == ""
    assert catalog.stored_bytes("t") == 6
    twin = add(catalog, "", "d", purpose="batch_output")
    assert catalog.remove_file(document.id, "t").doomed == []
    assert [one.is_video for one in catalog.remove_file(twin.id, "t").doomed] == [True]
    assert catalog.stored_bytes("t") == 3


def test_a_file_whose_id_is_given_is_entered_once_even_if_it_was_deleted(catalog):
    options = {"purpose": "batch_output", "file_id": "file-made"}
    kept = catalog.reserve_video("d" * 64)
    first = add(catalog, "", "d", video=kept, **options)
    assert first.id == "file-made"
    other = catalog.reserve_video("e" * 64)
    assert add(catalog, "", "e", video=other, **options).sha256 == first.sha256
    assert [one.name for one in catalog.tombstones(9)] == ["e" * 64]  # the bytes that were not needed
    catalog.remove_file(first.id, "t")
    assert add(catalog, "", "d", **options).state.value == "deleted"
    assert catalog.stored_bytes("t") == 0
