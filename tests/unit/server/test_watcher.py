"""Waiting for videos: one query for all who wait, woken by what they wait for."""

import asyncio
import contextlib
import time

import pytest

from f2l_vllm.catalog import catalog as database
from f2l_vllm.catalog.listener import listen
from f2l_vllm.catalog.notices import CHANNEL
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.videos import watcher as watching
from f2l_vllm.server.videos.watcher import Watcher
from tests.support.catalog_steps import add, claim, publish
from tests.support.pgbouncer import find_pgbouncer, pooled

WAITING = (VideoState.UPLOADED, 0.0)
READERS = 400
SOON_SECONDS = 10.0  # of a busy machine; a question that nothing wakes waits for longer


class Catalog:
    def __init__(self):
        self.files = {f"file-{index}": WAITING for index in range(READERS)}
        self.asked = []

    def progress(self, file_ids):
        self.asked.append(len(file_ids))
        return {file_id: self.files[file_id] for file_id in file_ids if file_id in self.files}


def test_progress_wakes_its_readers_and_the_end_everybody_with_one_query_a_tick():
    async def scenario():
        catalog = Catalog()
        watcher = Watcher(catalog, lambda: False)
        readers = [asyncio.create_task(watcher.wait(file_id, 30, WAITING)) for file_id in catalog.files]
        question = asyncio.create_task(watcher.wait("file-1", 30))
        await asyncio.sleep(0.3)
        assert set(catalog.asked) == {READERS}
        assert len(catalog.asked) <= 11
        assert not any(task.done() for task in (*readers, question))
        catalog.files["file-1"] = (VideoState.DECODING, 0.5)
        assert await readers[1] == (VideoState.DECODING, 0.5)
        assert not readers[2].done()
        assert not question.done()
        catalog.files["file-1"] = (VideoState.PROCESSED, 1.0)
        del catalog.files["file-2"]
        assert await question is None
        assert await readers[2] is None
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        asked = len(catalog.asked)
        await asyncio.sleep(0.2)
        assert len(catalog.asked) <= asked + 1  # nobody waits: nothing is asked

    asyncio.run(scenario())


def test_a_question_that_is_cancelled_as_its_file_gets_ready_is_cancelled():
    async def scenario():
        def cancelled_at_the_last_moment():
            asyncio.get_running_loop().call_soon(question.cancel)
            return True

        watcher = Watcher(Catalog(), cancelled_at_the_last_moment)
        question = asyncio.create_task(watcher.wait("file-1", 30))
        with pytest.raises(asyncio.CancelledError):
            await question

    asyncio.run(scenario())


def test_a_slow_catalog_is_asked_less_often():
    async def scenario():
        catalog = Catalog()
        quick = catalog.progress

        def slow(file_ids):
            time.sleep(0.02)
            return quick(file_ids)

        catalog.progress = slow
        watcher = Watcher(catalog, lambda: False)
        assert await watcher.wait("file-1", 1.0, WAITING) == WAITING
        assert len(catalog.asked) <= 4

    asyncio.run(scenario())


def test_readers_are_bounded_for_one_tenant_and_for_all_and_slow_down_together():
    watcher = Watcher(Catalog(), lambda: False, reader_share=0.5)
    assert watcher.event_seconds == 0.1
    for tenant in ("a", "b"):
        for _ in range(500):
            watcher.add_reader(tenant)
        with pytest.raises(APIError) as refused:
            watcher.add_reader(tenant)
        assert (refused.value.status, refused.value.code) == (429, "too_many_readers")
    with pytest.raises(APIError):
        watcher.add_reader("c")
    assert watcher.event_seconds == 5.0
    watcher.remove_reader("a")
    watcher.add_reader("c")


async def soon(what):
    """What it comes to."""
    async with asyncio.timeout(SOON_SECONDS):
        return await what


async def asked_times(asked, count):
    """Wait until the catalog was asked so often."""
    async with asyncio.timeout(SOON_SECONDS):
        while len(asked) < count:
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def listening(postgres, listens=True):
    """A real catalog, its listener that is heard or None, and the times at which the catalog was asked.

    Without a notice a question rests for longer than these tests take.
    """
    catalog, asked = database.Catalog(postgres.new_database()), []
    progress = catalog.progress
    catalog.progress = lambda file_ids: asked.append(time.monotonic()) or progress(file_ids)
    listener = listen(catalog) if listens else None
    deadline = time.monotonic() + 30
    while listener is not None and not listener.is_heard:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(watching, "_REST_SECONDS", 60.0)
        yield catalog, listener, asked
    if listener is not None:
        listener.close()
    catalog.close()


@pytest.mark.parametrize("listens", [True, False])
def test_a_question_waits_with_few_queries_where_notices_arrive_and_is_woken_at_once(postgres, listens):
    async def scenario(catalog, listener, asked):
        record = add(catalog)
        watcher = Watcher(catalog, lambda: False, listener=listener)
        question = asyncio.create_task(watcher.wait(record.id, 30))
        if listens:
            await asyncio.sleep(2.0)
            assert len(asked) <= 2
        else:
            await asked_times(asked, 5)
        await asyncio.to_thread(publish, catalog)
        assert await soon(question) is None

    with listening(postgres, listens) as parts:
        asyncio.run(scenario(*parts))


def test_readers_of_events_see_progress_at_once_beside_questions(postgres):
    async def scenario(catalog, listener, asked):
        record = add(catalog)
        claim(catalog)
        watcher = Watcher(catalog, lambda: False, listener=listener)
        question = asyncio.create_task(watcher.wait(record.id, 30))
        await asyncio.sleep(0.3)
        reader = asyncio.create_task(watcher.wait(record.id, 30, WAITING))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(catalog.advance, "f2l-1", VideoState.DECODING, 0.5)
        assert await soon(reader) == (VideoState.DECODING, 0.5)
        assert not question.done()
        await asyncio.sleep(0.3)
        rested = len(asked)
        await asyncio.sleep(0.6)
        assert len(asked) <= rested + 1
        question.cancel()

    with listening(postgres) as parts:
        asyncio.run(scenario(*parts))


def test_a_question_that_comes_after_the_notice_is_not_left_waiting(postgres):
    async def scenario(catalog, listener, asked):
        first, second = add(catalog), add(catalog, "f2l-2", sha="b")
        watcher = Watcher(catalog, lambda: False, listener=listener)
        question = asyncio.create_task(watcher.wait(second.id, 30))
        await asyncio.to_thread(publish, catalog)
        await asyncio.sleep(0.3)
        assert await soon(watcher.wait(first.id, 30)) is None
        question.cancel()

    with listening(postgres) as parts:
        asyncio.run(scenario(*parts))


def test_many_notices_during_a_query_cause_one_more(postgres):
    async def scenario(catalog, listener, asked):
        record = add(catalog)
        watcher = Watcher(catalog, lambda: False, listener=listener)
        progress = catalog.progress

        def slow(file_ids):
            found = progress(file_ids)
            for _ in range(20):
                catalog.notify(CHANNEL, "files")
            time.sleep(0.02)
            return found

        catalog.progress = slow
        question = asyncio.create_task(watcher.wait(record.id, 30))
        await asked_times(asked, 1)
        catalog.progress = progress
        await asked_times(asked, 2)
        await asyncio.sleep(0.5)
        assert len(asked) <= 4
        question.cancel()

    with listening(postgres) as parts:
        asyncio.run(scenario(*parts))


def test_a_stop_of_the_server_is_noticed_while_nothing_is_asked(postgres):
    async def scenario(catalog, listener, asked):
        record, stopping = add(catalog), []
        watcher = Watcher(catalog, lambda: bool(stopping), listener=listener)
        question = asyncio.create_task(watcher.wait(record.id, 30))
        await asyncio.sleep(0.3)
        stopping.append(True)
        assert await soon(question) is None

    with listening(postgres) as parts:
        asyncio.run(scenario(*parts))


@pytest.mark.skipif(find_pgbouncer() is None, reason="pgbouncer is not installed")
def test_behind_a_pooler_questions_are_woken_by_polling(postgres):
    async def scenario(catalog, listener):
        record = add(catalog)
        watcher = Watcher(catalog, lambda: False, listener=listener)
        question = asyncio.create_task(watcher.wait(record.id, 30))
        await asyncio.to_thread(publish, catalog)
        assert await soon(question) is None
        assert not listener.is_heard

    with pooled(postgres.new_database()) as url:
        catalog = database.Catalog(url)
        listener = listen(catalog)
        asyncio.run(scenario(catalog, listener))
        listener.close()
        catalog.close()
