"""Many processes at one catalog, locked, full and away; in both databases."""

import contextlib
import multiprocessing
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from sqlalchemy import create_engine, event, insert, make_url, text

from f2l_vllm.catalog import database
from f2l_vllm.catalog.catalog import Catalog, QueueFull
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import files
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.errors import CatalogBusy, StoreUnavailable
from tests.support import ROOT
from tests.support.catalog_steps import add, claim, publish
from tests.support.disk import LimitedDisk
from tests.support.stages import alive, ends_within

_SPAWN = multiprocessing.get_context("spawn")


@contextlib.contextmanager
def locked(url):
    """Another writer that does not end."""
    if url.startswith("sqlite"):
        other = sqlite3.connect(make_url(url).database)
        other.execute("BEGIN IMMEDIATE")
        yield
        other.close()
        return
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        connection.execute(text("LOCK TABLE files, jobs, adapters IN EXCLUSIVE MODE"))
        yield
    engine.dispose()


def _upload_and_publish(url, worker):
    """One process's part: files of its own, and some that all share."""
    catalog = Catalog(url)
    for index in range(6):
        add(catalog, adapter=f"f2l-{worker}-{index}", sha=str(worker), limit=1000)
        add(catalog, adapter=f"f2l-shared-{index}", sha="s", limit=1000)
        for job in catalog.claim_jobs(2):
            catalog.advance(job.adapter_name, VideoState.PUBLISHING, 0.5)
            assert catalog.finish_job(job.adapter_name, rank=16, size=1, info=AdapterInfo()) is not None
    catalog.close()


def test_processes_that_write_at_once_lose_nothing(database_url):
    catalog = Catalog(database_url)
    writers = [_SPAWN.Process(target=_upload_and_publish, args=(database_url, worker)) for worker in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    while (job := claim(catalog)) is not None:
        catalog.finish_job(job.adapter_name, rank=16, size=1, info=AdapterInfo())
    files, _ = catalog.files("t", after=None, limit=100, descending=False)
    assert len(files) == 36
    assert {record.state for record in files} == {VideoState.PROCESSED}
    found = catalog.adapters_of(files)
    assert len(found) == 24
    assert len({adapter.id for adapter in found.values()}) == 24
    catalog.close()


def test_connections_that_open_a_new_database_at_once_wait_for_each_other(tmp_path):
    for attempt in range(40):  # SQLite refuses about one in twenty at once
        url, together = f"sqlite:///{tmp_path / str(attempt)}.sqlite3", threading.Barrier(6)

        def open_it(url=url, together=together):
            together.wait()
            database.Database(url).close()

        with ThreadPoolExecutor(6) as threads:
            for opened in [threads.submit(open_it) for _ in range(6)]:
                opened.result()


def test_a_file_entered_while_its_adapter_is_published_never_waits_for_ever(database_url):
    catalog = Catalog(database_url)
    for index in range(10):
        name = f"f2l-{index}"
        add(catalog, adapter=name, sha=str(index))
        claim(catalog)
        begin = threading.Barrier(2)

        def finish(name=name, begin=begin):
            begin.wait()
            catalog.finish_job(name, rank=1, size=1, info=AdapterInfo())

        thread = threading.Thread(target=finish)
        thread.start()
        begin.wait()
        late = add(catalog, adapter=name, sha=str(index))
        thread.join()
        assert catalog.file(late.id, "t").state is VideoState.PROCESSED
    catalog.close()


def test_a_locked_catalog_is_waited_for_then_said_and_still_read(database_url):
    catalog = Catalog(database_url, busy_seconds=0.3)
    record = add(catalog)
    with locked(database_url):
        assert catalog.file(record.id, "t") == record
        with pytest.raises(CatalogBusy, match="busy"):
            add(catalog, adapter="f2l-2", sha="b")
        with pytest.raises(CatalogBusy):
            catalog.claim_jobs(1)
        with pytest.raises(CatalogBusy):
            catalog.remove_file(record.id, "t")
    assert publish(catalog) is not None
    assert len(catalog.files("t", after=None, limit=9, descending=True)[0]) == 1
    catalog.close()


def test_a_reader_waits_no_longer_for_a_change_of_tables(postgres):
    url = postgres.new_database()
    catalog = Catalog(url, busy_seconds=0.3)
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        connection.execute(text("LOCK TABLE files, tombstones IN ACCESS EXCLUSIVE MODE"))
        reading = (lambda: catalog.find(["file-1"], "t"), lambda: catalog.reserve_video("a" * 64), catalog.counts)
        for read in reading:
            with pytest.raises(CatalogBusy, match="busy"):
                read()
    engine.dispose()
    assert catalog.find(["file-1"], "t") == {}
    catalog.close()


@pytest.mark.parametrize(("tenant_limit", "entered"), [(None, 5), (3, 3)])
def test_uploads_at_once_do_not_exceed_the_queue(database_url, tenant_limit, entered):
    catalogs, begin = [Catalog(database_url) for _ in range(3)], threading.Barrier(12)

    def enter(number):
        begin.wait()
        try:
            add(catalogs[number % 3], f"f2l-{number}", sha=f"{number:x}", limit=5, tenant_limit=tenant_limit)
        except QueueFull as error:
            return str(error)
        return "entered"

    with ThreadPoolExecutor(12) as threads:
        results = list(threads.map(enter, range(12)))
    refused = f"{entered} videos are waiting to be internalized already"
    assert sorted(results) == sorted(["entered"] * entered + [refused] * (12 - entered))
    assert catalogs[0].counts() == ({"uploaded": entered}, entered, 0)
    assert catalogs[0].stored_bytes("t") == 3 * entered
    for catalog in catalogs:
        catalog.close()


def test_use_is_noted_while_the_same_files_are_made_and_expire(postgres):
    url, failures, stopped = postgres.new_database(), [], threading.Event()
    catalog, other = Catalog(url, busy_seconds=30), Catalog(url, busy_seconds=30)
    ids = {}

    def note():
        while not stopped.is_set():
            try:
                other.touch(dict(ids), {})
            except CatalogBusy as error:  # a deadlock would be one
                failures.append(error)

    thread = threading.Thread(target=note)
    thread.start()
    for number in range(4):
        sha, name = str(number), f"f2l-{number}"
        for index in range(60):
            ids[add(catalog, name, sha=sha, expires_seconds=-1000.0 - index).id] = 1.0
        claim(catalog)
        for progress in range(10):
            catalog.advance(name, VideoState.DECODING, progress / 10)
        catalog.finish_job(name, rank=1, size=1, info=AdapterInfo())
        assert len(catalog.expire_files(time.time())) == 60
    stopped.set()
    thread.join()
    assert failures == []
    catalog.close()
    other.close()


def test_a_host_whose_clock_is_wrong_ends_no_file_and_gives_up_no_server(postgres, monkeypatch):
    url, real, clock = postgres.new_database(), time.time, {"off": -7200.0}
    right = Catalog(url)
    monkeypatch.setattr("time.time", lambda: real() + clock["off"])
    wrong = Catalog(url)
    wrong.pool = "pool"
    server, _ = wrong.join_server("one", "r")
    for clock["off"] in (-7200.0, 7200.0):  # as when somebody sets it
        assert wrong.beat_server(server, 0)
        wrong.beat()
        assert wrong.now() == pytest.approx(real(), abs=2)
        record = add(wrong, "f2l-1", expires_seconds=60.0)
        assert record.created_at == pytest.approx(real(), abs=2)
        assert record.id not in {removal.file.id for removal in wrong.expire_files(wrong.now())}
        assert wrong.file(record.id, "t") == record
        wrong.remove_file(record.id, "t")
        assert wrong.purge(wrong.now() - 60) == 0
        late = add(wrong, "f2l-2", expires_seconds=-1.0)
        assert wrong.file(late.id, "t") is None
    monkeypatch.undo()
    assert right.file(late.id, "t") is None
    assert right.revisions()[1] == {"r": 1}
    right.close()
    wrong.close()


def test_a_writer_that_is_killed_leaves_no_lock_and_nothing_half_done(database_url):
    catalog = Catalog(database_url, busy_seconds=5)
    entered = _SPAWN.Event()
    writer = _SPAWN.Process(target=_hold_a_transaction, args=(database_url, entered))
    writer.start()
    assert entered.wait(60)
    writer.kill()
    writer.join()
    add(catalog)
    assert len(catalog.files("t", after=None, limit=9, descending=True)[0]) == 1
    catalog.close()


def test_a_writer_that_is_cut_off_holds_nobody_up_for_long(postgres):
    url = postgres.new_database()
    catalog = Catalog(url)
    entered = _SPAWN.Event()
    writer = _SPAWN.Process(target=_hold_a_transaction, args=(url, entered))
    writer.start()
    assert entered.wait(60)
    add(catalog)  # with all that the writer's connection holds, as if nothing of its machine could be heard
    writer.kill()
    writer.join()
    assert len(catalog.files("t", after=None, limit=9, descending=True)[0]) == 1
    catalog.close()


def test_a_writer_that_was_held_up_for_too_long_has_to_begin_again(postgres, monkeypatch):
    monkeypatch.setattr(database, "_IDLE_SECONDS", 0.2)
    catalog = Catalog(postgres.new_database())

    def linger():
        with catalog._write() as connection:
            time.sleep(0.5)
            connection.execute(text("SELECT 1"))

    with pytest.raises(CatalogBusy):
        linger()
    catalog.close()


def _hold_a_transaction(url, entered):
    catalog = Catalog(url)
    values = {"id": "half", "tenant": "t", "filename": "", "purpose": "", "bytes": 0, "sha256": "", "adapter_name": ""}
    with catalog._write() as connection:
        connection.execute(insert(files).values({**values, "state": VideoState.UPLOADED, "created_at": 0.0}))
        entered.set()
        threading.Event().wait()


def test_a_database_that_was_away_is_found_again(postgres):
    catalog = Catalog(postgres.new_database(), busy_seconds=1)
    record = add(catalog)
    postgres.stop()
    try:
        with pytest.raises(CatalogBusy):
            catalog.file(record.id, "t")
    finally:
        postgres.start()
    assert catalog.file(record.id, "t") == record
    catalog.close()


def test_a_database_that_does_not_answer_is_away(monkeypatch):
    monkeypatch.setitem(database.SESSION, "connect_timeout", 2)  # the least that libpq waits
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(CatalogBusy):
        Catalog(f"postgresql://f2l@127.0.0.1:{silent.getsockname()[1]}/f2l")


@pytest.mark.parametrize(
    "step", [lambda catalog: catalog.counts(), lambda catalog: catalog.bury([])], ids=["read", "write"]
)
def test_a_database_that_goes_away_before_a_transaction_begins_is_away(postgres, step):
    url = postgres.new_database()
    catalog, other = Catalog(url), create_engine(url.replace("postgresql:", "postgresql+psycopg:"))

    def end(connection, *_):
        with other.connect() as killer:
            killer.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": connection.info.backend_pid})

    event.listen(catalog._engine, "checkout", end)  # which comes after the pool has found the connection alive
    with pytest.raises(CatalogBusy):
        step(catalog)
    event.remove(catalog._engine, "checkout", end)
    step(catalog)
    other.dispose()
    catalog.close()


def test_a_full_disk_is_said_and_the_catalog_goes_on_afterwards(tmp_path):
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    record = add(catalog)
    with catalog._read() as connection:
        size = connection.exec_driver_sql("PRAGMA page_count").scalar()
    pages = [size + 2]
    event.listen(catalog._engine, "begin", lambda c: c.exec_driver_sql(f"PRAGMA max_page_count={pages[0]}"))
    entered = 1
    with pytest.raises(StoreUnavailable, match="no room") as error:  # noqa: PT012
        while True:
            add(catalog, adapter=f"f2l-{entered}", sha="b", limit=10000)
            entered += 1
    assert error.value.full
    pages[0] = 1 << 20
    assert len(catalog.files("t", after=None, limit=10000, descending=True)[0]) == entered
    assert catalog.remove_file(record.id, "t") is not None
    add(catalog, adapter="f2l-again", sha="c", limit=10000)
    catalog.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [("mysql://host/name", "SQLite or PostgreSQL, not 'mysql'"), ("postgresql+nothing://host/name", "no driver")],
)
def test_a_database_that_cannot_be_used_is_refused_by_name(url, message):
    with pytest.raises(ValueError, match=message):
        Catalog(url)


def test_a_read_only_catalog_says_so_and_is_read(tmp_path):
    path = tmp_path / "catalog.sqlite3"
    catalog = Catalog(f"sqlite:///{path}")
    record = add(catalog)
    catalog.close()
    catalog = Catalog(f"sqlite:///file:{path}?mode=ro&uri=true")
    with pytest.raises(StoreUnavailable, match="cannot be read or written"):
        add(catalog)
    assert catalog.file(record.id, "t") == record
    catalog.close()


READ_ONLY_FOR_A_WHILE = """
import sys
from pathlib import Path
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.store.errors import StoreUnavailable
from tests.support.catalog_steps import add
folder = Path(sys.argv[1])
first = Catalog(f"sqlite:///{folder / 'catalog.sqlite3'}")
files = list(folder.iterdir())
for path in files:
    path.chmod(0o444)
second = Catalog(f"sqlite:///{folder / 'catalog.sqlite3'}")  # opens a file that may not be written
for tries in range(2):
    try:
        add(second)
    except StoreUnavailable as error:
        print(error)
    assert not second.counts()[0]  # is read, by a connection opened just now
for path in files:
    path.chmod(0o644)
assert first.file(add(second).id, "t")
"""


def test_a_catalog_that_could_not_be_written_for_a_while_is_written_afterwards(tmp_path):
    disk = LimitedDisk(tmp_path / "disk")
    command = [sys.executable, "-c", READ_ONLY_FOR_A_WHILE, disk.folder]
    said = disk.run(partial(subprocess.run, command, cwd=ROOT, capture_output=True, text=True))
    disk.close()
    assert said.stdout.count("readonly") == 2
    assert said.returncode == 0, said.stderr


def test_a_killed_test_run_leaves_no_postgres(postgres, tmp_path):
    """As a session of its own with a server of its own, ended by a signal that nobody can catch."""
    with tempfile.TemporaryDirectory(prefix="f2l-postgres-") as folder:
        code = (
            "import sys, time; from pathlib import Path; from tests.support.postgres import Postgres, find_postgres\n"
            "print(Postgres(Path(sys.argv[1]), find_postgres()).process.pid, flush=True); time.sleep(600)"
        )
        run = subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        server = int(run.stdout.readline())
        assert alive([server])
        run.kill()
        run.wait()
        assert ends_within(60, server)
