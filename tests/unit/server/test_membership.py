"""Which servers answer when the models change, and what they do while they adopt the files."""

import asyncio
import threading
import time

import pytest
from typer.testing import CliRunner

from f2l_vllm.catalog import revisions
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.cli.main import app
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.videos import forgetting, membership
from f2l_vllm.store.errors import CatalogBusy, OtherModels
from tests.unit.server.test_forgetting import Server, T, run


def test_servers_that_hear_notices_know_at_once_who_answers(tmp_path, postgres, monkeypatch):
    async def scenario(one, two):
        pair = [Server(tmp_path, name, one.url, name, listens=True) for name in ("one", "other")]
        for server in pair:
            await server.membership.attend()
        monkeypatch.setattr(membership, "_TICK_SECONDS", 3600.0)
        attending = [asyncio.create_task(server.membership.run()) for server in pair]
        while not all(server.listener.is_heard for server in pair):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # they attend once, as something may have been missed
        assert [server.membership.is_waiting for server in pair] == [False, True]
        await asyncio.to_thread(CliRunner().invoke, app, ["adopt", "--database-url", one.url])
        started = time.monotonic()
        while [server.membership.is_waiting for server in pair] != [True, False]:
            assert time.monotonic() - started < 60  # far less than it would take without the notice
            await asyncio.sleep(0.01)
        for task in attending:
            task.cancel()
        for server in pair:
            await asyncio.to_thread(server.service.close)

    run(scenario, tmp_path, postgres.new_database())


def test_a_server_answers_and_gives_signs_of_life_while_it_adopts_files(tmp_path, database_url, monkeypatch):
    monkeypatch.setattr(membership, "_TICK_SECONDS", 0.02)
    monkeypatch.setattr(forgetting, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(revisions, "_ADOPTED_AT_ONCE", 1)

    async def scenario(one, two):
        records = [(await one.upload(text))[0] for text in "abc"]
        other = Server(tmp_path, "other", database_url, revision="other")
        await other.membership.attend()
        slow = threading.Semaphore(1)
        has_video = other.store.has_video
        other.store.has_video = lambda video: slow.acquire(timeout=20) and has_video(video)
        other.catalog.appoint(other.catalog.revision)
        attending = asyncio.create_task(other.membership.attend())
        while not [record for record in records if one.catalog.file(record.id, T).state is VideoState.UPLOADED]:
            await asyncio.sleep(0.01)
        assert other.membership.why_not_ready is None
        refused = []
        for record in records:
            try:
                await other.service.ready(record.id, T, 0.0)
            except (OtherModels, APIError) as error:
                refused.append(getattr(error, "code", ""))
        assert sorted(refused).count("video_not_ready") == 1  # the one that is adopted already
        other.be_silent()
        while other.catalog.revisions()[1].get(other.catalog.revision) != 1:
            await asyncio.sleep(0.01)
        one.catalog.appoint(one.catalog.revision)  # back again, in the middle
        slow.release(2)
        await attending
        await other.membership.attend()
        assert "another model" in other.membership.why_not_ready
        assert [one.catalog.file(record.id, T).state for record in records].count(VideoState.UPLOADED) == 1
        other.service.close()

    run(scenario, tmp_path, database_url)


def test_a_server_whose_adoption_failed_adopts_again(tmp_path, database_url):
    def fail(*_):
        raise CatalogBusy("away")

    async def scenario(one, two):
        record, _ = await one.upload("a")
        other = Server(tmp_path, "other", database_url, revision="other")
        await other.membership.attend()
        other.catalog.appoint(other.catalog.revision)
        adopt, other.catalog.adopt = other.catalog.adopt, fail
        with pytest.raises(CatalogBusy):
            await other.membership.attend()
        assert other.membership.why_not_ready is not None
        other.catalog.adopt = adopt
        await other.membership.attend()
        assert one.catalog.file(record.id, T).state is VideoState.UPLOADED
        other.service.close()

    run(scenario, tmp_path, database_url)
