"""Waiting for videos: one query for all who wait, woken by what they wait for."""

import asyncio

import pytest

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.videos.watcher import Watcher

WAITING = (VideoState.UPLOADED, 0.0)
READERS = 400


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


def test_a_slow_catalog_is_asked_less_often():
    async def scenario():
        catalog = Catalog()
        quick = catalog.progress

        def slow(file_ids):
            import time

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
