"""Which changes PostgreSQL tells of, and which it does not."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import text

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.keys import key_hash
from f2l_vllm.catalog.notices import CHANNEL, JOBS_SECONDS
from f2l_vllm.catalog.states import VideoState
from tests.support.catalog_steps import add, claim, publish


@pytest.fixture
def catalog(postgres):
    catalog = Catalog(postgres.new_database())
    yield catalog
    catalog.close()


def connect(catalog):
    url = catalog.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(url, autocommit=True)


@pytest.fixture
def told(catalog):
    """What was told since the last call, sorted."""
    with connect(catalog) as connection:
        connection.execute(f"LISTEN {CHANNEL}")

        def since():
            catalog.notify(CHANNEL, "all")
            payloads = []
            for notice in connection.notifies(timeout=10):
                if notice.payload == "all":
                    break
                payloads.append(notice.payload)
            else:
                raise AssertionError(f"only {payloads} were heard")
            connection.execute("SELECT setval('f2l_jobs_told', 1)")  # as if it were long ago
            return sorted(payloads)

        yield since


def test_a_job_is_told_when_it_is_entered_and_when_it_waits_again(catalog, told):
    add(catalog)
    assert told() == ["jobs"]
    add(catalog)  # waits for the same job
    assert told() == []
    claim(catalog)
    assert told() == []
    catalog.release_job("f2l-1")
    assert told() == ["deletions", "jobs"]  # what the attempt may have put into the store
    claim(catalog)
    catalog.release_all_jobs(blameless=True)
    assert told() == ["deletions", "jobs"]
    publish(catalog)
    told()
    catalog.forget_adapter(catalog.adapter("f2l-1"))
    assert told() == ["deletions", "jobs"]


def test_the_end_of_work_is_told_once_for_all_files(catalog, told):
    for _ in range(3):
        add(catalog)
    add(catalog, "f2l-2", sha="b")
    told()
    publish(catalog)
    assert told() == ["files"]
    assert add(catalog).state is VideoState.PROCESSED
    assert told() == []  # nobody waits for it
    claim(catalog)
    catalog.fail_job("f2l-2", "internalization_failed", "it failed")
    assert told() == ["deletions", "files"]  # what the attempt may have written is to be removed


def test_deletions_are_told(catalog, told):
    record = add(catalog)
    add(catalog, "f2l-2", sha="b", expires_seconds=-1.0)
    publish(catalog)
    told()
    catalog.remove_file(record.id, "t")
    assert told() == ["deletions", "files"]
    assert len(catalog.expire_files(time.time())) == 1
    assert told() == ["deletions", "files"]
    video = catalog.reserve_video("c" * 64)
    assert told() == []
    catalog.give_back_video(video)
    assert told() == ["deletions"]
    catalog.bury(catalog.tombstones(10))
    assert told() == []


def test_a_revoked_key_is_told(catalog, told):
    key = catalog.add_key("news")
    assert told() == []  # who is asked with it looks by itself
    catalog.revoke_key(key_hash(key))
    assert told() == ["deletions"]


def test_an_appointed_revision_is_told_and_one_that_stays_is_not(catalog, told):
    catalog.appoint("one")
    assert told() == ["models"]
    assert catalog.is_appointed("two")  # no server runs
    assert told() == ["models"]
    assert catalog.is_appointed("two")
    assert told() == []


def test_nothing_is_told_of_use_progress_and_signs_of_life(catalog, told):
    catalog.pool = "pool"
    catalog.beat()
    server, _ = catalog.join_server("one", "r")
    assert told() == []
    record = add(catalog, video=catalog.reserve_video("a" * 64))
    assert told() == ["jobs"]
    claim(catalog)
    catalog.advance("f2l-1", VideoState.DECODING, 0.1)
    catalog.advance("f2l-1", VideoState.DECODING, 0.2)
    catalog.touch({record.id: 1.0}, {"f2l-1": 1.0})
    catalog.beat()
    catalog.beat_server(server, 0)
    catalog.pin_file(record.id, "t", True)
    catalog.hold_duty("janitor", "one")
    catalog.is_due("sweep", 1.0)
    assert told() == []


def test_of_many_jobs_the_first_is_told_and_one_a_while_later(catalog, told):
    started = time.monotonic()
    for number in range(10):
        add(catalog, f"f2l-{number}", limit=99)
    lasted = time.monotonic() - started
    time.sleep(JOBS_SECONDS)
    add(catalog, "f2l-late", limit=99)
    payloads = told()
    assert set(payloads) == {"jobs"}
    assert 2 <= len(payloads) <= 2 + lasted / JOBS_SECONDS
    with catalog._write() as connection:
        ahead = int((time.time() + 3600) * 1000)
        connection.execute(text(f"SELECT setval('f2l_jobs_told', {ahead})"))
    add(catalog, "f2l-clock", limit=99)
    assert told() == ["jobs"]  # also after the clock was set back


def test_what_is_not_committed_is_not_told(catalog, told):
    def fail():
        with catalog._write() as connection:
            connection.execute(text("UPDATE files SET state = 'processed'"))
            raise KeyError

    add(catalog)
    told()
    with pytest.raises(KeyError):
        fail()
    assert told() == []


def test_a_catalog_of_an_earlier_version_tells_once_it_is_opened_by_many_at_once(catalog, told):
    with catalog._write() as connection:
        connection.execute(text("DROP FUNCTION f2l_tell, f2l_tell_of_job CASCADE"))
        connection.execute(text("DROP SEQUENCE f2l_jobs_told"))
        connection.execute(
            text("DROP TABLE alembic_version, batches, answers, uploads, streams, pieces, watches, watch_answers")
        )
    add(catalog)
    with catalog._write() as connection:
        connection.execute(text("ALTER TABLE jobs DROP COLUMN trace"))
    start = threading.Barrier(4)

    def open_it(_number):
        start.wait()
        Catalog(catalog.url.render_as_string(hide_password=False)).close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(open_it, range(4)))
    add(catalog, "f2l-2", sha="b")
    publish(catalog)
    assert told() == ["files", "jobs"]
    catalog.appoint("one")
    assert told() == ["models"]
