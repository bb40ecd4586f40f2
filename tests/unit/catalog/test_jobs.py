"""Jobs of several pools at one catalog, and what a claim reads of a long queue; in both databases."""

import time
from contextlib import contextmanager

import pytest
from sqlalchemy import event, insert, update

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.jobs import LEASE_SECONDS
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import files, jobs, pools
from f2l_vllm.store.adapter_info import AdapterInfo
from tests.support.catalog_steps import add, claim


class Pools:
    """Catalogs of several servers' pools over one database."""

    def __init__(self, url):
        self._url, self._catalogs = url, []

    def start(self, name):
        """What a pool does when it has the lock of its data folder."""
        catalog = Catalog(self._url)
        self._catalogs.append(catalog)
        catalog.pool = name
        if name is not None:
            catalog.beat()
        catalog.release_all_jobs(blameless=False)
        return catalog

    def silence(self, catalog, seconds):
        """Let its last sign of life lie so far back."""
        with catalog._write() as connection:
            chosen = update(pools).where(pools.c.id == catalog.pool)
            connection.execute(chosen.values(seen_at=time.time() - seconds))

    def close(self):
        for catalog in self._catalogs:
            catalog.close()


@pytest.fixture
def servers(database_url):
    servers = Pools(database_url)
    yield servers
    servers.close()


def test_a_pool_that_starts_leaves_another_ones_jobs_alone(servers):
    one = servers.start("one")
    record = add(one)
    job = claim(one)
    one.advance("f2l-1", VideoState.ENCODING, 0.5)
    two = servers.start("two")
    assert two.beat() == 0
    assert claim(two) is None
    assert two.file(record.id, "t").state is VideoState.ENCODING
    two.release_all_jobs(blameless=True)  # it stops, too
    one.finish_job("f2l-1", rank=16, size=1, info=AdapterInfo())
    assert one.file(record.id, "t").state is VideoState.PROCESSED
    assert job.attempts == 1


def test_a_pool_that_starts_again_calls_its_own_jobs_back(servers):
    one, two = servers.start("one"), servers.start("two")
    for number in (1, 2):
        add(one, adapter=f"f2l-{number}", sha=str(number))
    assert [claim(one).adapter_name, claim(two).adapter_name] == ["f2l-1", "f2l-2"]
    again = servers.start("one")
    assert (claim(again).adapter_name, claim(again)) == ("f2l-1", None)


def test_jobs_of_a_dead_pool_are_taken_over_and_it_is_heard_no_more(servers):
    dead, alive = servers.start("dead"), servers.start("alive")
    record = add(dead)
    claim(dead)
    dead.advance("f2l-1", VideoState.PUBLISHING, 0.5)
    servers.silence(dead, LEASE_SECONDS - 10)
    assert alive.beat() == 0  # a long step, or a slow network
    servers.silence(dead, LEASE_SECONDS + 1)
    assert alive.beat() == 1
    assert alive.file(record.id, "t").state is VideoState.UPLOADED
    assert claim(alive).attempts == 2
    alive.advance("f2l-1", VideoState.DECODING, 0.1)
    dead.advance("f2l-1", VideoState.PUBLISHING, 0.9)
    dead.fail_job("f2l-1", "code", "message")
    dead.release_job("f2l-1")
    assert dead.finish_job("f2l-1", rank=16, size=1, info=AdapterInfo()) is None
    assert dead.release_all_jobs(blameless=True) == 0
    found = alive.file(record.id, "t")
    assert (found.state, found.progress) == (VideoState.DECODING, 0.1)
    assert alive.finish_job("f2l-1", rank=16, size=1, info=AdapterInfo()) is not None
    assert dead.beat() == 0  # it was only away
    add(dead, adapter="f2l-2", sha="b")
    assert claim(dead).adapter_name == "f2l-2"


def test_what_a_given_up_attempt_puts_into_the_store_late_is_removed_for_a_while(servers, monkeypatch):
    silent, alive = servers.start("silent"), servers.start("alive")
    add(silent)
    late = claim(silent)
    servers.silence(silent, LEASE_SECONDS + 1)
    assert alive.beat() == 1
    last = claim(alive)
    alive.finish_job("f2l-1", rank=16, size=1, info=AdapterInfo(), token=last.token)
    for _ in range(2):  # its worker is killed after that, and reports nothing
        alive.reopen_late()
        assert [one.object for one in alive.tombstones(10)] == [late.object]
        alive.bury(alive.tombstones(10))
        assert alive.tombstones(10) == []
    monkeypatch.setattr("f2l_vllm.catalog.tombstones._LATE_SECONDS", -1.0)
    alive.reopen_late()
    assert alive.tombstones(10) == []


def test_a_job_of_a_catalog_without_pools_waits_again(servers):
    old = servers.start(None)
    add(old)
    claim(old)
    one = servers.start("one")
    assert claim(one).adapter_name == "f2l-1"


@contextmanager
def rows_read(catalog):
    """How many rows queries have given to this process, by counting them as they come."""
    count = [0]

    def fetched(connection, cursor, statement, parameters, context, executemany):
        if cursor.description is not None and catalog._engine.dialect.name == "postgresql":
            count[0] += cursor.rowcount

    def factory(_cursor, row):
        count[0] += 1
        return row

    def begun(connection):
        if catalog._engine.dialect.name == "sqlite":
            connection.connection.dbapi_connection.row_factory = factory

    event.listen(catalog._engine, "after_cursor_execute", fetched)
    event.listen(catalog._engine, "begin", begun)
    yield count
    event.remove(catalog._engine, "after_cursor_execute", fetched)
    event.remove(catalog._engine, "begin", begun)


def enter(catalog, waiting, background=False):
    """So many files of each tenant, each waiting for a job of its own, first all of one, then the next's."""
    file = {"filename": "", "purpose": "vision", "bytes": 1, "state": VideoState.UPLOADED, "created_at": 0.0}
    names = [(tenant, f"{tenant}{number}") for tenant, count in waiting.items() for number in range(count)]
    of_files = [{**file, "id": n, "tenant": t, "sha256": n, "adapter_name": n, "progress": 0.0} for t, n in names]
    job = {"running": 0, "attempts": 0, "background": background, "created_at": 0.0}
    with catalog._write() as connection:
        connection.execute(insert(files), of_files)
        connection.execute(insert(jobs), [{**job, "adapter_name": name, "sha256": name} for _, name in names])


def test_a_claim_reads_no_more_of_a_long_queue_than_of_a_short_one(catalog):
    enter(catalog, {"a": 5000})
    enter(catalog, {"b": 3, "c": 2})
    with rows_read(catalog) as count:
        assert [job.adapter_name for job in catalog.claim_jobs(4)] == ["a0", "b0", "c0", "a1"]
        assert 0 < count[0] <= 30
        count[0] = 0
        assert [claim(catalog).adapter_name for _ in range(4)] == ["b1", "c1", "a2", "b2"]
        assert 0 < count[0] <= 4 * 10
    with rows_read(catalog) as count:
        assert len(catalog.claim_jobs(2)) == 2
        assert 0 < count[0] <= 20
    assert catalog.counts()[1:] == (5005 - 10, 10)


def test_the_next_videos_are_those_that_the_next_claims_take(catalog):
    assert catalog.next_videos(2) == []
    enter(catalog, {"a": 5000})
    enter(catalog, {"b": 3})
    with rows_read(catalog) as count:
        assert catalog.next_videos(3) == ["a0", "b0", "a1"]
        assert 0 < count[0] <= 30
    assert [catalog.claim_jobs(1)[0].video for _ in range(3)] == ["a0", "b0", "a1"]
    (again,) = catalog.claim_jobs(1)
    catalog.release_job(again.adapter_name)  # it cost its worker
    assert again.video not in catalog.next_videos(9)


def test_a_job_whose_video_is_decoded_comes_first_if_its_turn_is_near(catalog):
    enter(catalog, {"a": 9})
    assert [job.video for job in catalog.claim_jobs(1, ahead="a1", among=2)] == ["a1"]
    assert [job.video for job in catalog.claim_jobs(1, ahead="a8", among=2)] == ["a0"]
    assert [job.video for job in catalog.claim_jobs(2, ahead="a3", among=2)] == ["a3", "a2"]
    assert [job.video for job in catalog.claim_jobs(1, ahead="gone", among=2)] == ["a4"]


def test_a_job_that_has_cost_a_worker_is_not_passed_over_for_videos_that_are_decoded(catalog):
    enter(catalog, {"a": 9})
    (job,) = catalog.claim_jobs(1)
    catalog.release_job(job.adapter_name)
    assert "a1" in catalog.next_videos(2)
    assert [(job.video, job.attempts) for job in catalog.claim_jobs(1, ahead="a1", among=2)] == [("a0", 2)]


def test_a_long_queue_of_the_background_comes_last_and_is_not_read_either(catalog):
    enter(catalog, {"a": 5000}, background=True)
    enter(catalog, {"b": 1})
    with rows_read(catalog) as count:
        assert [job.adapter_name for job in catalog.claim_jobs(2)] == ["b0", "a0"]
        assert [job.adapter_name for job in catalog.claim_jobs(2)] == ["a1", "a2"]
        assert 0 < count[0] <= 30


def test_the_work_in_the_database_does_not_grow_with_the_queue(tmp_path):
    """In instructions of SQLite's virtual machine, which are the same on every machine."""
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    taken = {}
    for entered in (50, 5000):
        enter(catalog, {f"a{entered}-": entered, f"b{entered}-": 5})
        instructions = [0]

        def tick(instructions=instructions):
            instructions[0] += 10

        def begun(connection, tick=tick):
            connection.connection.dbapi_connection.set_progress_handler(tick, 10)

        event.listen(catalog._engine, "begin", begun)
        for _ in range(5):
            assert claim(catalog) is not None
        event.remove(catalog._engine, "begin", begun)
        taken[entered] = instructions[0]
    catalog.close()
    assert 0 < taken[5000] < 3 * taken[50]


def test_a_job_carries_the_trace_of_the_upload_that_asked_for_it(catalog):
    traced = f"00-{'a' * 32}-{'b' * 16}-01"
    add(catalog, "f2l-a", "a", trace=traced)
    add(catalog, "f2l-a", "a", trace=f"00-{'c' * 32}-{'d' * 16}-01")  # waits for the same job
    add(catalog, "f2l-b", "b")
    assert {job.adapter_name: job.trace for job in catalog.claim_jobs(9)} == {"f2l-a": traced, "f2l-b": None}
