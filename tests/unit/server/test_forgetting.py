"""Servers of one catalog and one store: what one deletes, all forget, in their engines, on their disks, in memory."""

import asyncio
import contextlib
import hashlib
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import update
from typer.testing import CliRunner

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.listener import listen
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Upload, duties, files, servers
from f2l_vllm.catalog.tombstones import name_video
from f2l_vllm.cli.main import app
from f2l_vllm.server import metrics
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.registry import AdapterLost, Registry
from f2l_vllm.server.videos import keeping, membership
from f2l_vllm.server.videos.routes import file_content
from f2l_vllm.server.videos.service import VideoService
from f2l_vllm.settings import Settings
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.address import Revisions
from f2l_vllm.store.cached_store import open_store
from f2l_vllm.store.errors import CatalogBusy, OtherModels
from f2l_vllm.store.manifest import StoreError
from tests.support.engine import Engine

T = "tenant"
MANY = 40  # more than any pool of threads takes at once


class Server:
    """One of several, without vLLM in front and with this test as its worker."""

    def __init__(self, folder, name, url, revision="one", listens=False):
        home = self.home = folder / name
        self.store = open_store(home, url=f"file://{folder / 'store'}", hot_bytes=1 << 20)
        self.url, self.catalog = url, Catalog(url)
        self.engine = Engine()
        options = {"base_model": "base", "host_slots": 8, "wanted": self.catalog.refers_to}
        self.registry = Registry({}, self.engine, self.store, **options)
        self.store.protect(self.registry.holds, self.catalog.refers_to)
        revisions = Revisions("base", revision)
        self.listener = listen(self.catalog) if listens else None
        self.service = VideoService(
            Settings(home=home), revisions, self.catalog, self.store, self.registry, None, lambda: False, self.listener
        )
        self.forgetting, self.membership = self.service.forgetting, self.service.membership

    async def upload(self, text):
        """A ready file of these bytes, and its adapter."""
        temporary = self.store.temporary()
        temporary.write_text(text)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        record = await self.service.enter(temporary, Upload(T, sha256, len(text), "v.mp4", "vision"))
        self.work()
        return record, self.catalog.adapter(record.adapter_name)

    def keep(self, text):
        """Where an upload of these bytes has put them, before it is entered."""
        temporary = self.store.temporary()
        temporary.write_text(text)
        video = self.catalog.reserve_video(hashlib.sha256(text.encode()).hexdigest())
        self.store.keep_video(temporary, video.video)
        return video

    def work(self):
        """Make every adapter that waits."""
        while jobs := self.catalog.claim_jobs(1):

            def write(directory):
                directory.mkdir()
                (directory / "weights").write_text(jobs[0].adapter_name)

            self.store.publish_adapter(jobs[0].object, write, {})
            self.catalog.finish_job(jobs[0].adapter_name, rank=4, size=9, info=AdapterInfo(), token=jobs[0].token)

    async def use(self, adapter, record):
        """Have everything of it that a server can have."""
        lease = await self.registry.acquire(adapter)
        self.store.prepare(adapter.object)
        self.store.fetch_video(record.video)
        return lease

    @property
    def left(self):
        memory = Path("/dev/shm") / f"f2l-{os.getuid()}-{hashlib.sha256(str(self.home).encode()).hexdigest()[:12]}"
        folders = (self.home / "adapters", self.home / "videos", memory)
        files = [path for folder in folders if folder.exists() for path in folder.rglob("*") if path.is_file()]
        return [*self.engine.names.values(), *files]

    def be_silent(self):
        """For longer than it is waited for."""
        with self.catalog._write() as connection:
            mine = servers.c.id == self.forgetting.server
            connection.execute(update(servers).where(mine).values(seen_at=0.0))


def entered_with(server, video):
    """The generation that a file entered with these bytes has."""
    with server.catalog._write(beside=[video.sha256]) as connection:
        return name_video(connection, video)


@contextlib.asynccontextmanager
async def two(folder, url):
    pair = [Server(folder, name, url) for name in ("one", "two")]
    try:
        for server in pair:
            await server.membership.attend()
        yield pair
    finally:
        for server in pair:
            await asyncio.to_thread(server.service.close)


def run(scenario, tmp_path, database_url):
    async def whole():
        async with two(tmp_path, database_url) as pair:
            await scenario(*pair)

    asyncio.run(whole())


def test_what_one_deletes_all_forget(tmp_path, database_url):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        other, other_adapter = await one.upload("b")
        for server in (one, two):
            for its in ((adapter, record), (other_adapter, other)):
                (await server.use(*its)).release()
        await asyncio.sleep(0)
        doomed = await one.service.remove(record.id, T)
        assert len(two.left) == 2 + 2 * (2 * 2 + 1)
        assert not await one.forgetting.erased(doomed, 0.1)
        for server in (one, two):
            await server.forgetting.forget()
        assert await one.forgetting.erased(doomed, 0.1)
        for server in (one, two):
            assert len(server.left) == 1 + 2 * 2 + 1  # of the other video
            (await server.registry.acquire(other_adapter)).release()
        await one.service.remove(other.id, T)
        await two.forgetting.forget()
        assert two.left == []
        assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []

    run(scenario, tmp_path, database_url)


class Pictures(set[str]):
    """A server's own memory of videos, beside its store."""

    def names(self):
        return list(self)

    forget = set.discard


def test_pictures_of_a_video_that_another_deletes_go_with_it_even_after_an_absence(tmp_path, database_url):
    async def scenario(one, two):
        for is_away in (False, True):
            record, _ = await one.upload("a")
            pictures = Pictures({record.video})
            two.forgetting.include(pictures)
            doomed = await one.service.remove(record.id, T)
            assert not await one.forgetting.erased(doomed, 0.1)
            if is_away:
                two.forgetting._seen += 9  # as if the deletion were too old to be told
                await two.forgetting.join()
            else:
                await two.forgetting.forget()
            assert pictures == set()

    run(scenario, tmp_path, database_url)


def test_a_server_that_hears_of_a_deletion_forgets_at_once(monkeypatch, tmp_path, postgres):
    async def scenario(one, two):
        hearing = Server(tmp_path, "hearing", one.url, listens=True)
        await hearing.membership.attend()
        monkeypatch.setattr(membership, "_TICK_SECONDS", 3600.0)
        attending = asyncio.create_task(hearing.membership.run())
        record, adapter = await one.upload("a")
        while not hearing.listener.is_heard:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # it attends once, as something may have been missed
        (await hearing.use(adapter, record)).release()
        await asyncio.sleep(0)
        assert hearing.left != []
        await one.service.remove(record.id, T)
        started = time.monotonic()
        while hearing.left:
            assert time.monotonic() - started < 60  # far less than it would take without the notice
            await asyncio.sleep(0.01)
        attending.cancel()
        await asyncio.to_thread(hearing.service.close)
        assert not hearing.listener._thread.is_alive()

    run(scenario, tmp_path, postgres.new_database())


def test_an_answer_that_is_being_written_ends_first(tmp_path, database_url):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        lease = await two.use(adapter, record)
        doomed = await one.service.remove(record.id, T)
        for _ in range(2):
            await two.forgetting.forget()
            await one.forgetting.forget()
            assert list(two.engine.names.values()) == [adapter.object]
            assert not await one.forgetting.erased(doomed, 0.0)
        lease.release()
        while two.engine.names:
            await asyncio.sleep(0.01)
        await two.forgetting.forget()
        assert await one.forgetting.erased(doomed, 0.1)
        assert two.left == []

    run(scenario, tmp_path, database_url)


def test_a_server_that_was_away_forgets_before_it_is_counted_again(tmp_path, database_url):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        (await two.use(adapter, record)).release()
        await asyncio.sleep(0)
        doomed = await one.service.remove(record.id, T)
        await one.forgetting.forget()
        two.be_silent()
        assert await one.forgetting.erased(doomed, 0.1)  # it is not waited for
        one.forgetting._said_at = 0.0
        await one.forgetting.forget()  # and given up
        with one.catalog._write() as connection:
            connection.execute(servers.delete().where(servers.c.id == two.forgetting.server))
        before = two.forgetting.server
        two.forgetting._seen += 1  # as if the deletion were too old to be told
        two.forgetting._said_at = 0.0
        await two.forgetting.forget()
        assert two.forgetting.server != before
        assert two.forgetting.has_joined
        assert two.left == []

    run(scenario, tmp_path, database_url)


def test_a_server_that_may_have_been_given_up_is_not_ready_until_it_has_forgotten(tmp_path, database_url, monkeypatch):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        (await two.use(adapter, record)).release()
        await two.membership.attend()
        assert two.membership.why_not_ready is None
        await one.service.remove(record.id, T)
        monkeypatch.setattr("f2l_vllm.server.videos.forgetting.SERVER_SECONDS", 1.0)
        await asyncio.sleep(1.1)  # it was cut off for so long
        assert two.left
        assert two.membership.why_not_ready is not None
        await two.membership.attend()
        assert two.left == []
        assert two.membership.why_not_ready is None

    run(scenario, tmp_path, database_url)


def test_a_server_that_starts_forgets_what_was_deleted_while_it_was_down(tmp_path, database_url):
    async def scenario(one, two):
        gone, gone_adapter = await one.upload("a")
        kept, kept_adapter = await one.upload("b")
        for its in ((gone_adapter, gone), (kept_adapter, kept)):
            (await two.use(*its)).release()
        copy = tmp_path / "crashed"
        shutil.copytree(two.home, copy)
        await one.service.remove(gone.id, T)
        again = Server(tmp_path, "crashed", database_url)
        assert not again.forgetting.has_joined
        await again.forgetting.join()
        names = {path.name for path in (copy / "adapters").iterdir()} | {path.name for path in copy.glob("videos/*/*")}
        assert names == {kept_adapter.object, kept.video}
        again.service.close()

    run(scenario, tmp_path, database_url)


def test_bytes_that_arrive_after_they_were_deleted_do_not_stay(tmp_path, database_url):
    async def scenario(one, two):
        record, _ = await one.upload("a")
        fetched, deleted = threading.Event(), threading.Event()
        fetch = two.store._remote.get_video

        def late(video, target):
            fetch(video, target)
            fetched.set()
            deleted.wait()

        two.store._remote.get_video = late
        fetching = asyncio.create_task(asyncio.to_thread(two.service.fetch_video, record))
        await asyncio.to_thread(fetched.wait)
        await one.service.remove(record.id, T)
        for server in (one, two):
            await server.forgetting.forget()
        deleted.set()
        with pytest.raises(StoreError, match="deleted a moment ago"):
            await fetching
        assert two.left == []

    run(scenario, tmp_path, database_url)


def test_what_was_uploaded_again_stays(tmp_path, database_url):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        (await two.use(adapter, record)).release()
        await one.service.remove(record.id, T)
        again, new = await one.upload("a")
        await two.forgetting.forget()
        assert two.left == []
        (await two.use(new, again)).release()
        for server in (one, two):
            await server.forgetting.forget()
            assert server.store.verify_adapter(new.object)
        assert list(two.engine.names.values()) == [new.object]

    run(scenario, tmp_path, database_url)


@pytest.mark.parametrize("removes", ["remove_video", "remove_adapter"])
def test_a_store_that_hangs_holds_up_neither_deletions_nor_forgetting(tmp_path, database_url, monkeypatch, removes):
    monkeypatch.setattr(keeping, "_PATIENCE_SECONDS", 0.1)

    async def scenario(one, two):
        hangs, begun, is_over = getattr(one.store._remote, removes), [], threading.Event()

        def hang(name):
            begun.append(name)
            assert is_over.wait(60)
            hangs(name)

        monkeypatch.setattr(one.store._remote, removes, hang)
        made = [await one.upload(f"{number}") for number in range(MANY)]
        (await two.use(made[0][1], made[0][0])).release()
        async with asyncio.timeout(30):
            await asyncio.gather(*(one.service.remove(record.id, T) for record, _ in made))
            for server in (one, two):
                await server.forgetting.forget()
        assert one.left == two.left == []
        assert 1 < len(begun) < MANY  # several at a time
        await one.service._keeper.bury_all()
        assert len(begun) == len(set(begun))  # each once
        is_over.set()
        while one.catalog.tombstones(1):
            await asyncio.sleep(0.01)
        assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []

    run(scenario, tmp_path, database_url)


def test_an_adapter_that_comes_after_it_was_forgotten_is_not_kept(tmp_path, database_url, monkeypatch):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        monkeypatch.setattr(one.store._remote, "remove_adapter", lambda _name: None)  # later than the fetch
        get, loop = two.store._remote.get_adapter_file, asyncio.get_running_loop()

        async def delete():
            await one.service.remove(record.id, T)
            await two.forgetting.forget()

        def get_late(name, file, target):
            get(name, file, target)
            if file == "weights":
                asyncio.run_coroutine_threadsafe(delete(), loop).result(30)

        monkeypatch.setattr(two.store._remote, "get_adapter_file", get_late)
        with pytest.raises(StoreError, match="was deleted a moment ago"):
            await asyncio.to_thread(two.store.prepare, adapter.object)
        assert two.left == []

    run(scenario, tmp_path, database_url)


def test_bytes_that_were_uploaded_beside_the_same_bytes_are_forgotten(tmp_path, database_url):
    async def scenario(one, two):
        unrelated, _ = await one.upload("b")
        video = two.keep("a")
        record, _ = await one.upload("a")  # is entered first
        await one.service.remove(unrelated.id, T)
        await two.forgetting.forget()
        assert entered_with(two, video) == record.generation
        assert two.left != []
        await one.service._keeper.bury_all()
        await two.forgetting.forget()
        assert two.left == []

    run(scenario, tmp_path, database_url)


def test_bytes_of_an_upload_that_ended_with_its_server_are_forgotten(tmp_path, database_url, monkeypatch):
    async def scenario(one, two):
        two.keep("a")
        unrelated, _ = await one.upload("b")
        await one.service.remove(unrelated.id, T)
        again = Server(tmp_path, "two", database_url)  # the first one was killed
        await again.membership.attend()
        monkeypatch.setattr("f2l_vllm.catalog.tombstones._RESERVED_SECONDS", -1.0)
        await one.service._keeper.bury_all()
        await again.forgetting.forget()
        assert again.left == []
        assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
        again.service.close()

    run(scenario, tmp_path, database_url)


def test_bytes_that_are_being_sent_are_sent_whole(tmp_path, database_url):
    async def scenario(one, two):
        record, _ = await one.upload("the bytes")
        state = SimpleNamespace(f2l=two.service)
        asked = SimpleNamespace(app=SimpleNamespace(state=state), state=SimpleNamespace(tenant=T))
        answer = await file_content(record.id, asked)
        await one.service.remove(record.id, T)
        await two.forgetting.forget()
        assert two.left == []
        sent = []

        async def send(message):
            sent.append(message)

        await answer({"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": "2.4"}}, None, send)
        assert b"".join(message.get("body", b"") for message in sent) == b"the bytes"
        with pytest.raises(APIError, match="No video"):
            await file_content(record.id, asked)

    run(scenario, tmp_path, database_url)


def test_a_question_that_comes_too_late_brings_nothing_back(tmp_path, database_url):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        two.store.verify_adapter(adapter.object)  # has fetched it
        with pytest.MonkeyPatch.context() as patch:  # the deletion is known, and its files are everywhere still
            patch.setattr(one.service._keeper, "bury", lambda doomed: asyncio.sleep(0))
            await one.service.remove(record.id, T)
        with pytest.raises(AdapterLost, match="deleted a moment ago"):
            await two.registry.acquire(adapter)
        assert two.engine.names == {}

    run(scenario, tmp_path, database_url)


def test_a_server_whose_comparison_was_interrupted_compares_again(tmp_path, database_url):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        (await two.use(adapter, record)).release()
        await asyncio.sleep(0)
        doomed = await one.service.remove(record.id, T)
        with pytest.MonkeyPatch.context() as patch:

            def named(_names):
                raise CatalogBusy("away")

            patch.setattr(two.catalog, "named", named)
            with pytest.raises(CatalogBusy):
                await two.forgetting.join()
            with pytest.raises(CatalogBusy):
                await two.forgetting.forget()
        assert two.membership.why_not_ready is not None
        assert two.left != []
        await one.forgetting.forget()
        assert not await one.forgetting.erased(doomed, 0.0)
        await two.forgetting.forget()
        assert two.left == []
        assert await one.forgetting.erased(doomed, 0.1)
        assert two.membership.why_not_ready is None

    run(scenario, tmp_path, database_url)


def test_a_server_that_was_killed_is_not_waited_for_once_it_is_back(tmp_path, database_url):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        (await two.use(adapter, record)).release()
        doomed = await one.service.remove(record.id, T)
        await one.forgetting.forget()
        assert not await one.forgetting.erased(doomed, 0.0)
        again = Server(tmp_path, "two", database_url)  # the first one said nothing when it ended
        await again.membership.attend()
        assert await one.forgetting.erased(doomed, 0.1)
        again.service.close()

    run(scenario, tmp_path, database_url)


def test_a_server_with_other_models_waits_until_those_that_run_have_stopped(tmp_path, database_url):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        other = Server(tmp_path, "other", database_url, revision="other")
        for _ in range(2):
            await other.membership.attend()
            assert "another model" in other.membership.why_not_ready
            with pytest.raises(OtherModels):
                await other.service.ready(record.id, T, 0.0)
            with pytest.raises(OtherModels):
                other.service.check_room(0)  # before a byte is received
            with pytest.raises(OtherModels):
                await other.upload("b")
        assert other.catalog.claim_jobs(1) == []
        assert [path for path in other.home.rglob("videos/*/*") if path.is_file()] == []
        for server in (one, two):
            await server.membership.attend()
            assert server.membership.why_not_ready is None
            assert (await server.service.ready(record.id, T, 0.0)).adapter == adapter
            await asyncio.to_thread(server.forgetting.leave)
        await other.membership.attend()
        assert other.membership.why_not_ready is None
        other.work()
        found = await other.service.ready(record.id, T, 0.0)
        assert found.adapter is not None
        assert found.adapter.name != adapter.name
        other.service.close()

    run(scenario, tmp_path, database_url)


def test_a_catalog_that_moves_to_other_models_is_never_answered_by_the_earlier_servers(tmp_path, database_url):
    async def scenario(one, two):
        record, adapter = await one.upload("a")
        other = Server(tmp_path, "other", database_url, revision="other")
        await other.membership.attend()
        (await one.use(adapter, record)).release()
        two.be_silent()  # and is not heard of before the move
        assert CliRunner().invoke(app, ["adopt", "--database-url", database_url]).exit_code == 0
        with pytest.raises(OtherModels):
            await one.upload("b")  # it has not noticed yet
        assert (await one.service.ready(record.id, T, 0.0)).adapter == adapter  # nothing else is made of it yet
        assert one.catalog.claim_jobs(1) == []
        await other.membership.attend()
        assert other.membership.why_not_ready is None
        for server in (one, two):
            with pytest.raises(OtherModels):
                await server.service.ready(record.id, T, 0.0)
            await server.membership.attend()
            assert "another model" in server.membership.why_not_ready
            assert server.catalog.claim_jobs(1) == []
        other.work()
        found = await other.service.ready(record.id, T, 0.0)
        assert found.adapter.name != adapter.name
        for server in (one, two):
            with pytest.raises(OtherModels):
                await server.service.ready(record.id, T, 0.0)
        again = CliRunner().invoke(app, ["adopt", "--database-url", database_url])
        assert again.exit_code == 0  # back
        await one.membership.attend()
        assert one.membership.why_not_ready is None
        assert (await one.service.ready(record.id, T, 0.0)).adapter == adapter  # nothing has removed it meanwhile
        other.service.close()

    run(scenario, tmp_path, database_url)


def test_one_server_tidies_up_for_all_and_another_when_it_is_gone(tmp_path, database_url):
    async def scenario(one, two):
        for server in (one, two, one):
            await server.service.tidy()
        assert (one.service.janitor.has_duty, two.service.janitor.has_duty) == (True, False)
        record, _ = await one.upload("a")
        with one.catalog._write() as connection:
            connection.execute(update(files).values(expires_at=1.0))
        await two.service.tidy()
        assert two.catalog.states([record.id]) == {record.id: "processed"}
        await one.service.tidy()
        assert one.catalog.states([record.id]) == {record.id: "expired"}
        again = Server(tmp_path, "one", database_url)  # after a crash: it has the duty still
        await again.membership.attend()
        await two.service.tidy()
        assert not two.service.janitor.has_duty
        await again.service.tidy()
        assert again.service.janitor.has_duty
        await asyncio.to_thread(again.service.close)
        await two.service.tidy()
        assert two.service.janitor.has_duty
        with two.catalog._write() as connection:
            connection.execute(update(duties).values(taken_at=0.0))  # it was stopped in the middle
        await one.service.tidy()
        assert one.service.janitor.has_duty
        await two.service.tidy()
        assert not two.service.janitor.has_duty

    run(scenario, tmp_path, database_url)


def test_an_adapter_is_kept_ready_at_one_server(tmp_path, database_url):
    async def scenario(one, two):
        for server in (one, two):
            await server.service.tidy()
        found = [await one.upload(str(number)) for number in range(8)]
        for record, _ in found[:6]:
            await one.service.pin(record.id, T, True)
        for server in (one, two):
            await server.service.tidy()
        ready = [set(server.store._hot.names()) for server in (one, two)]
        assert ready[0] | ready[1] == {adapter.object for _, adapter in found}
        assert ready[0] & ready[1] == set()
        pinned = [server.store._hot.pinned for server in (one, two)]
        assert pinned[0] <= ready[0]
        assert pinned[1] <= ready[1]
        assert len(pinned[0]) + len(pinned[1]) == 6
        for server in (one, two):
            await server.service.residents.warm(8)
        assert {*one.engine.names.values()} == ready[0]
        assert {*two.engine.names.values()} == ready[1]
        await asyncio.to_thread(two.forgetting.leave)
        await one.service.tidy()
        assert len(one.store._hot.pinned) == 6

    run(scenario, tmp_path, database_url)


def test_what_the_catalog_holds_is_shown_once(tmp_path, database_url):
    async def scenario(one, two):
        await one.upload("a")

        async def shown(server):
            await server.service.tidy()
            return sum(metrics.VIDEOS.labels(state.value)._value.get() for state in VideoState)

        assert [await shown(server) for server in (one, two, one)] == [1, 0, 1]

    run(scenario, tmp_path, database_url)


def test_a_use_just_before_the_end_counts_whichever_server_ends_files(tmp_path, database_url):
    async def scenario(one, two):
        record, _ = await one.upload("a")
        await one.service.tidy()  # it has the duty
        soon = time.time() + 5
        with one.catalog._write() as connection:
            connection.execute(update(files).values(expires_at=soon, idle_seconds=3600.0))
        await two.service.ready(record.id, T, 0.0)
        assert one.catalog.expire_files(soon + 1) == []

    run(scenario, tmp_path, database_url)


def test_only_servers_that_wait_can_be_adopted(tmp_path, database_url):
    async def scenario(one, two):
        def adopt(*words):
            return CliRunner().invoke(app, ["adopt", *words, "--database-url", database_url])

        assert "no server waits" in adopt().output
        others = [Server(tmp_path, name, database_url, revision=name) for name in ("x", "y")]
        for other in others:
            await other.membership.attend()
        assert "name one of" in adopt().output
        assert "no server waits with z" in adopt("z").output
        assert one.catalog.revisions()[0] == one.catalog.revision
        assert adopt(others[1].catalog.revision).exit_code == 0
        for other in others:
            await other.membership.attend()
        assert [other.membership.why_not_ready is None for other in others] == [False, True]
        for other in others:
            other.service.close()

    run(scenario, tmp_path, database_url)
