"""The service's rules about the life of videos, over a real catalog, store and registry and an engine that records."""

import asyncio
import contextlib
import hashlib
import sqlite3
import threading
import time

import httpx
import pytest
from fastapi import FastAPI

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.server.errors import APIError, answer
from f2l_vllm.server.registry import Registry
from f2l_vllm.server.videos.routes import router
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.settings import Settings
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.address import Revisions
from f2l_vllm.store.cached_store import open_store
from f2l_vllm.store.errors import CatalogBusy, StoreUnavailable
from tests.support.engine import Engine

T = "tenant"


class Bench:
    """A server's videos, without vLLM in front and with this test as the worker."""

    def __init__(self, folder, revision="one", url=None, busy_seconds=10.0, hot_bytes=0, database=None):
        home = folder / "home"
        self.store = open_store(home, url=url, hot_bytes=hot_bytes)
        self.catalog = Catalog(database or f"sqlite:///{folder / 'catalog.sqlite3'}", busy_seconds)
        self.engine = Engine()
        self.registry = Registry(
            {}, self.engine, self.store, base_model="base", host_slots=8, wanted=self.catalog.refers_to
        )
        self.revisions = Revisions("base", revision)
        self.service = VideoService(
            Settings(home=home), self.revisions, self.catalog, self.store, self.registry, None, lambda: False
        )
        self.catalog.is_appointed(self.catalog.revision)

    async def upload(self, text, **options):
        temporary = self.store.temporary()
        temporary.write_text(text)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        try:
            given = {"tenant": T, "filename": "v.mp4", "purpose": "vision", **options}
            return await self.service.enter(temporary, Upload(sha256=sha256, bytes=len(text), **given))
        finally:
            temporary.unlink(missing_ok=True)

    def work(self):
        """Do every job that waits."""
        while found := self.catalog.claim_jobs(1):

            def write(directory):
                directory.mkdir()
                (directory / "weights").write_text(found[0].adapter_name)

            self.store.publish_adapter(found[0].object, write, {})
            self.catalog.finish_job(found[0].adapter_name, rank=16, size=1, info=AdapterInfo(), token=found[0].token)

    def object(self, file):
        """The name of its adapter in the store."""
        return self.catalog.adapter(file.adapter_name).object

    async def ask(self, file):
        found = await self.service.ready(file.id, T, 0.0)
        (await self.registry.acquire(found.adapter)).release()
        await asyncio.sleep(0)


def stored(bench):
    return [path for path in bench.store.home.rglob("*") if path.is_file()]


def run(scenario):
    asyncio.run(scenario())


@contextlib.contextmanager
def locked(folder):
    other = sqlite3.connect(folder / "catalog.sqlite3")
    other.execute("BEGIN IMMEDIATE")
    yield
    other.close()


def test_a_restart_makes_what_was_used_last_resident(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        files = [await bench.upload(str(index)) for index in range(4)]
        bench.work()
        await bench.service.pin(files[3].id, T, True)
        await bench.ask(files[1])
        await bench.service.tidy()
        again = Bench(tmp_path)
        again.service.adopt()
        await again.service.residents.warm(2)
        assert list(again.engine.paths) == [bench.object(files[3]), bench.object(files[1])]
        await again.ask(files[0])

    run(scenario)


def test_an_adapter_that_was_deleted_is_not_removed_once_more_while_it_is_made_again(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        file = await bench.upload("video")
        bench.work()
        stale = bench.catalog.adapter(file.adapter_name)
        await bench.service.remove(file.id, T)

        def write(directory):
            directory.mkdir()
            (directory / "weights").write_text("fresh")

        bench.store.publish_adapter(stale.name, write, {})  # by a worker that has not entered it yet
        await bench.service.remake(stale, RuntimeError("as it was deleted"))
        assert (bench.store.load_path(stale.name) / "weights").read_text() == "fresh"

    run(scenario)


def test_a_video_of_other_revisions_is_never_answered_from_its_old_adapter(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        file = await bench.upload("video")
        bench.work()
        again = Bench(tmp_path, revision="two")
        again.service.adopt()
        await again.service.residents.warm(9)
        with pytest.raises(APIError, match="still being internalized"):
            await again.ask(file)
        await again.service.tidy()
        assert again.store.adapter_path(bench.object(file)).is_dir()  # until its successor is there
        again.work()
        await again.ask(file)
        assert list(again.engine.paths) == [again.catalog.adapter(again.revisions.name(file.sha256)).object]
        third = Bench(tmp_path, revision="two")
        await third.service.tidy()
        assert [path.name for path in (third.store.home / "adapters").iterdir()] == list(again.engine.paths)

    run(scenario)


def test_without_its_bytes_a_video_of_other_revisions_fails_and_says_why(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        file = await bench.upload("video")
        bench.work()
        bench.store.remove_video(file.video)
        again = Bench(tmp_path, revision="two")
        again.service.adopt()
        with pytest.raises(APIError, match="adapter_of_other_revision"):
            await again.ask(file)
        back = Bench(tmp_path)
        back.service.adopt()
        await back.ask(file)
        assert list(back.engine.paths) == [back.object(file)]

    run(scenario)


def test_a_question_is_a_use_and_moves_the_end_of_a_video_on(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        file = await bench.upload("video", expires_seconds=5.0, idle_seconds=3600.0)
        bench.work()
        await bench.ask(file)
        await bench.service.tidy()
        found = bench.catalog.file(file.id, T)
        assert found.last_used_at >= file.created_at
        assert found.expires_at == pytest.approx(found.last_used_at + 3600)

    run(scenario)


def test_an_upload_that_a_busy_catalog_refuses_leaves_nothing_and_works_the_next_time(tmp_path):
    async def scenario():
        bench = Bench(tmp_path, busy_seconds=0.2)
        with locked(tmp_path), pytest.raises(CatalogBusy):
            await bench.upload("video")
        assert stored(bench) == []
        file = await bench.upload("video")
        bench.work()
        with locked(tmp_path):
            await bench.ask(file)  # needs no write
            with pytest.raises(CatalogBusy):
                await bench.service.tidy()
        await bench.service.tidy()
        assert bench.catalog.file(file.id, T).last_used_at is not None  # noted all the same

    run(scenario)


def test_a_delete_is_done_even_if_the_store_is_away(tmp_path, monkeypatch):
    async def scenario():
        bench = Bench(tmp_path, url=f"file://{tmp_path / 'far'}")
        file = await bench.upload("video")
        bench.work()

        def away(*_args, **_options):
            raise ConnectionError("no route")

        files = type(bench.store._remote._files)
        with monkeypatch.context() as patch:
            for method in ("rm_file", "rm", "put_file"):
                patch.setattr(files, method, away)
            await bench.service.remove(file.id, T)
            with pytest.raises(APIError, match="No video"):
                await bench.service.find([file.id], T)
            with pytest.raises(StoreUnavailable, match="no route"):
                await bench.upload("another")
        await bench.service.tidy()
        assert [path for path in (tmp_path / "far").rglob("videos/*/*") if path.is_file()] == []
        bench.store.sweep(bench.catalog.named, older_than_s=-1)
        assert stored(bench) == []
        assert [path for path in (tmp_path / "far").rglob("*") if path.is_file()] == []

    run(scenario)


def test_a_delete_leaves_nothing_in_catalog_store_and_memory(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        for text in ("one", "two", "three"):
            file = await bench.upload(text)
            bench.work()
            await bench.ask(file)
            await bench.service.remove(file.id, T)
        assert stored(bench) == []
        assert bench.catalog.purge(time.time() + 1) == 3
        assert bench.catalog.counts() == ({}, 0, 0)
        assert {state.value for state in VideoState}.isdisjoint(bench.catalog.counts()[0])

    run(scenario)


def test_what_a_killed_server_had_deleted_goes_when_the_next_one_starts(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        file = await bench.upload("video")
        bench.work()
        assert bench.catalog.remove_file(file.id, T) is not None  # and there the server ends
        assert len(stored(bench)) > 1
        again = Bench(tmp_path)
        await again.service.tidy()
        assert stored(again) == []
        assert again.catalog.tombstones(9) == []

    run(scenario)


def test_what_nobody_names_is_swept_every_hour_not_at_the_start_only(tmp_path, monkeypatch):
    async def scenario():
        bench = Bench(tmp_path)
        file = await bench.upload("video")
        orphan = bench.store.video_path("a" * 64)
        orphan.parent.mkdir()
        orphan.write_bytes(b"x")
        await bench.service.tidy()
        assert orphan.exists()  # young: somebody may be about to name it
        hours = [time.time() + 7200, time.monotonic() + 7200]
        monkeypatch.setattr("f2l_vllm.store.cached_store.time.time", lambda: hours[0])
        monkeypatch.setattr("f2l_vllm.server.videos.service.time.monotonic", lambda: hours[1])
        await bench.service.tidy()
        assert not orphan.exists()
        assert bench.store.has_video(file.video)

    run(scenario)


def test_bytes_that_the_store_has_lost_come_back_with_the_next_upload(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        first = await bench.upload("video")
        bench.store.remove_video(first.video)
        second = await bench.upload("video")
        for file in (first, second):
            (found,) = await bench.service.find([file.id], T)
            assert bench.store.fetch_video(found.file.video).read_text() == "video"

    run(scenario)


def test_a_tenant_keeps_as_many_bytes_as_it_may_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setenv("F2L_TENANT_BYTES", "10")

    async def scenario():
        bench = Bench(tmp_path)
        uploads = (bench.upload(f"text{index}") for index in range(5))
        found = await asyncio.gather(*uploads, return_exceptions=True)
        kept = [file for file in found if not isinstance(file, Exception)]
        assert len(kept) == 2
        refused = [error for error in found if isinstance(error, APIError)]
        assert {(error.status, error.code) for error in refused} == {(403, "storage_quota_exceeded")}
        assert len(stored(bench)) == 2
        await bench.service.remove(kept[0].id, T)
        await bench.upload("again")

    run(scenario)


def test_below_the_reserve_uploads_are_refused_and_everything_else_goes_on(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        file = await bench.upload("video", expires_seconds=3600.0)
        bench.work()
        other = await bench.upload("other")
        bench.store.reserve.size = 1 << 62
        with pytest.raises(StoreUnavailable, match="stay free") as refused:
            await bench.upload("more")
        assert refused.value.full
        with pytest.raises(StoreUnavailable, match="stay free"):
            bench.service.check_room(1)
        with pytest.raises(StoreUnavailable, match="stay free"):
            bench.work()
        await bench.ask(file)
        await bench.service.tidy()
        await bench.service.remove(other.id, T)
        await bench.service.remove(file.id, T)
        assert stored(bench) == []

    run(scenario)


def test_a_catalog_that_cannot_be_written_breaks_no_answer(tmp_path, monkeypatch):
    async def scenario():
        bench = Bench(tmp_path)
        file = await bench.upload("video")

        def full(*_args):
            raise StoreUnavailable("no room is left", full=True)

        monkeypatch.setattr(bench.catalog, "hurry_job", full)
        monkeypatch.setattr(bench.catalog, "touch", full)
        asyncio.get_running_loop().call_later(0.2, bench.work)
        await bench.service.ready(file.id, T, 5.0)
        expired = await bench.upload("expired", expires_seconds=-1.0)
        with pytest.raises(StoreUnavailable):
            await bench.service.tidy()
        assert not bench.store.has_video(expired.video)  # expiry does not wait for the note of use

    run(scenario)


def test_what_was_published_lies_in_memory_before_its_first_question(tmp_path):
    async def scenario():
        bench = Bench(tmp_path, hot_bytes=1 << 20)
        try:
            await bench.service.tidy()
            file = await bench.upload("video")
            bench.work()
            await bench.service.tidy()
            assert bench.store.load_path(bench.object(file)) != bench.store.adapter_path(bench.object(file))
        finally:
            bench.store.close()

    run(scenario)


def test_the_event_loop_never_reads_or_writes_the_catalog(tmp_path):
    async def scenario():
        bench = Bench(tmp_path)
        app = FastAPI()
        app.include_router(router)
        app.state.f2l = bench.service
        app.state.f2l_base_model = "/models/base"

        @app.middleware("http")
        async def as_tenant(request, call_next):
            request.state.tenant = T
            return await call_next(request)

        loop, used = threading.current_thread(), []
        for name in ("_read", "_write"):
            opened = getattr(bench.catalog, name)

            def watched(*args, opened=opened, **values):
                assert threading.current_thread() is not loop
                used.append(opened.__name__)
                return opened(*args, **values)

            setattr(bench.catalog, name, watched)
        file = await bench.upload("video")
        await asyncio.to_thread(bench.work)
        found = (await bench.service.ready(file.id, T, 1.0)).adapter
        (await bench.registry.acquire(found)).release()
        used.clear()
        await bench.service.tidy()
        await bench.service.residents.warm(10)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            path = f"/v1/files/{file.id}"
            pinned = {"f2l": {"pinned": True}}
            for answer in (
                await client.get("/v1/files"),
                await client.get(path),
                await client.post(path, json=pinned),
                await client.get(f"{path}/content"),
                await client.get(f"{path}/events"),
                await client.get(f"{path}/adapter"),
                await client.delete(path),
            ):
                assert answer.status_code == 200
        assert {"_read", "_write"} == set(used)
        assert len(used) > 15

    run(scenario)


def test_lists_have_pages_and_are_made_in_pieces(tmp_path, monkeypatch):
    async def cards(_state):
        return [{"id": "base", "object": "model"}]

    monkeypatch.setattr("f2l_vllm.server.vllm_api.model_cards", cards)
    monkeypatch.setattr("f2l_vllm.server.videos.routes._AT_ONCE", 2)

    async def scenario():
        bench = Bench(tmp_path)
        app = FastAPI()
        app.include_router(router)
        app.add_exception_handler(APIError, answer)
        app.state.f2l = bench.service

        @app.middleware("http")
        async def as_tenant(request, call_next):
            request.state.tenant = T
            return await call_next(request)

        ids = [(await bench.upload(str(index))).id for index in range(5)]
        bench.work()
        ids.append((await bench.upload("waits")).id)
        newest = ids[::-1]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:

            async def listed(path, **parameters):
                found = (await client.get(path, params=parameters)).json()
                return [one["id"] for one in found["data"]], found

            shown, page = await listed("/v1/files")
            assert (shown, page["first_id"], page["last_id"]) == (newest, newest[0], newest[-1])
            assert (page["object"], page["has_more"], page["f2l"]) == ("list", False, {"stored_bytes": 10})
            shown, page = await listed("/v1/files", limit=3, after=newest[1])
            assert (shown, page["has_more"], page["last_id"]) == (newest[2:5], True, newest[4])
            assert (await listed("/v1/files", order="asc", limit=5))[0] == ids[:5]
            shown, page = await listed("/v1/models")
            assert (shown, page["has_more"]) == (["base", *newest[1:]], False)  # what waits is no model yet
            shown, page = await listed("/v1/models", limit=3)
            assert (shown, page["has_more"]) == (["base", *newest[1:4]], True)
            assert (await listed("/v1/models", after=page["last_id"]))[0] == newest[4:]
            for path in ("/v1/files", "/v1/models"):
                refused = await client.get(path, params={"after": "file-none"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_cursor")
            for file_id in newest[:-1]:
                await bench.service.remove(file_id, T)
            assert (await listed("/v1/files"))[0] == newest[-1:]
            await bench.service.remove(newest[-1], T)
            shown, page = await listed("/v1/files")
            assert (shown, page["first_id"], page["last_id"]) == ([], None, None)

    run(scenario)
