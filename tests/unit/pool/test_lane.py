"""When idle lanes look for jobs, with lanes whose worker needs no Ray."""

import contextlib
import hashlib
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.listener import listen
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.pool.lane import Lane, Work
from f2l_vllm.pool.messages import Published
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.cached_store import open_store
from tests.support.catalog_steps import add

_PATIENCE_SECONDS = 90.0  # far less than a lane rests


@pytest.fixture
def long_rest(monkeypatch):
    """A lane that missed a notice looks for jobs an hour later: what is made here, a notice has brought."""
    monkeypatch.setattr("f2l_vllm.pool.lane._REST_SECONDS", 3600.0)


class IdleLane(Lane):
    """Finishes each job at once."""

    def _ensure_actor(self):
        pass

    def _run(self, jobs):
        for job in jobs.values():
            self._catalog.finish_job(job.adapter_name, rank=1, size=1, info=AdapterInfo(), token=job.token)
        jobs.clear()


@contextlib.contextmanager
def idle_lanes(url, listens, count=2):
    """A catalog that nothing waits in, lanes, and the times at which they look for jobs."""
    catalog, looks, stopping = Catalog(url), [], threading.Event()
    claim = catalog.claim_jobs
    catalog.claim_jobs = lambda limit, **options: looks.append(time.monotonic()) or claim(limit, **options)
    listener = listen(catalog) if listens else None
    work = Work(catalog, None, 1, 60, 3, None, None, print, stopping, threading.Event(), listener)
    lanes = [IdleLane(index, work) for index in range(count)]
    for lane in lanes:
        lane.start()
    deadline = time.monotonic() + 30
    while listener is not None and not listener.is_heard:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield catalog, looks
    finally:
        stopping.set()
        for lane in lanes:
            lane.wake()
            lane.join(_PATIENCE_SECONDS)
        if listener is not None:
            listener.close()
        catalog.close()
    assert not any(lane.is_alive() for lane in lanes)


def until_made(catalog, *records):
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for record in records:
        while catalog.file(record.id, "t").state != "processed":
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.mark.parametrize("listens", [True, False])
def test_idle_lanes_look_seldom_where_notices_arrive_and_take_jobs_at_once(postgres, long_rest, listens):
    with idle_lanes(postgres.new_database(), listens) as (catalog, looks):
        deadline = time.monotonic() + 30
        while not listens and len(looks) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while listens and looks and looks[-1] > time.monotonic() - 2.0:  # lively ones rest again
            assert time.monotonic() < deadline
            time.sleep(0.1)
        until_made(catalog, add(catalog))


def test_lanes_that_meet_at_one_job_leave_none_waiting(postgres, long_rest):
    with idle_lanes(postgres.new_database(), True, count=4) as (catalog, _):
        for start in range(0, 40, 8):
            records = [add(catalog, f"f2l-{n}", sha=f"{n:02d}"[-1], limit=99) for n in range(start, start + 8)]
            until_made(catalog, *records)
            time.sleep(0.3)


def test_a_job_that_waits_again_is_taken_at_once(postgres, long_rest):
    with idle_lanes(postgres.new_database(), True) as (catalog, _):
        other = Catalog(catalog.url.render_as_string(hide_password=False))
        other.pool = "other"
        record = add(catalog)
        while not other.claim_jobs(1) and catalog.file(record.id, "t").state != "processed":
            pass  # whoever is first
        time.sleep(1.0)
        other.release_all_jobs(blameless=True)
        until_made(catalog, record)
        other.close()


def test_bytes_that_were_fetched_after_they_were_deleted_are_dropped(tmp_path):
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    store = open_store(tmp_path / "home", url=f"file://{tmp_path / 'far'}")
    fetched = {}
    for name in ("kept", "deleted"):
        (tmp_path / name).write_text(name)
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        video = catalog.reserve_video(sha256)
        store.keep_video(tmp_path / name, video.video)
        file = catalog.add_file(Upload("t", sha256, 1, "v", "vision"), f"f2l-{name}", queue_limit=9, video=video)
        fetched[name] = catalog.claim_jobs(1)[0], store.video_path(video.video), file
    catalog.remove_file(fetched["deleted"][2].id, "t")
    lane = IdleLane(0, Work(catalog, store, 1, 60, 3, None, None, print, threading.Event(), threading.Event(), None))
    for job, path, _ in fetched.values():
        assert path.is_file()
        lane._give_back({job.object: job}, blameless=True)
    assert [path.is_file() for _, path, _ in fetched.values()] == [True, False]
    assert catalog.counts()[1:] == (1, 0)
    catalog.close()


@pytest.mark.parametrize("keeps", [True, False])
def test_workers_without_a_server_leave_nothing_of_a_job_here(tmp_path, keeps):
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    store = open_store(tmp_path / "home", url=f"file://{tmp_path / 'far'}")
    (tmp_path / "video").write_text("video")
    video = catalog.reserve_video(hashlib.sha256(b"video").hexdigest())
    store.keep_video(tmp_path / "video", video.video)
    catalog.add_file(Upload("t", video.sha256, 1, "v", "vision"), "f2l-one", queue_limit=9, video=video)
    (job,) = catalog.claim_jobs(1)

    def write(directory):
        directory.mkdir()
        (directory / "weights").write_text("weights")

    store.publish_adapter(job.object, write, {})
    work = Work(catalog, store, 1, 60, 3, None, None, print, threading.Event(), threading.Event(), None, keeps)
    IdleLane(0, work)._end(job, Published(rank=1, bytes=1, info=AdapterInfo()))
    assert catalog.counts() == ({"processed": 1}, 0, 0)
    assert (sorted(store.kept()) == sorted([job.object, video.video])) == keeps
    assert keeps or store.kept() == []
    assert store.load_path(job.object).is_dir()  # it is in the store
    catalog.close()


def test_what_an_attempt_that_was_given_up_has_made_is_refused_and_removed_and_the_log_says_it(tmp_path, caplog):
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    store = open_store(tmp_path / "home")
    add(catalog, "f2l-one")
    (late,) = catalog.claim_jobs(1)
    catalog.release_job("f2l-one", blameless=True)
    (job,) = catalog.claim_jobs(1)
    lane = IdleLane(0, Work(catalog, store, 1, 60, 3, None, None, print, threading.Event(), threading.Event()))
    for attempt in (late, job):
        store.publish_adapter(attempt.object, Path.mkdir, {})
        with caplog.at_level("INFO"):
            lane._end(attempt, Published(rank=1, bytes=1, info=AdapterInfo()))
    assert [store.adapter_path(one.object).is_dir() for one in (late, job)] == [False, True]
    assert [one.getMessage() for one in caplog.records] == [
        f"{late.object} is refused and removed: its files were deleted, or its attempt was given up"
    ]
    catalog.close()


class Actor:
    """Notes what a worker is told to decode ahead."""

    def __init__(self):
        self.told = []
        self.look_ahead = SimpleNamespace(remote=self.told.append)


@pytest.fixture
def looking(tmp_path):
    """Two lanes whose workers are at work, over a catalog in which videos wait."""
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    files = [add(catalog, f"f2l-{sha}", sha=sha) for sha in "abcd"]
    work = Work(catalog, None, 1, 60, 3, None, None, print, threading.Event(), threading.Event(), lanes=2)
    lanes = [IdleLane(index, work) for index in range(2)]
    for lane in lanes:
        lane._actor = Actor()
    yield catalog, files, lanes
    catalog.close()


def test_each_worker_decodes_another_video_ahead_and_only_one(looking):
    _, _, lanes = looking
    for lane in [*lanes, *lanes]:
        lane._look_ahead()
    assert [lane._actor.told for lane in lanes] == [["a" * 64], ["b" * 64]]


def test_a_video_decoded_ahead_is_dropped_when_its_last_file_is_deleted(looking):
    catalog, files, (lane, _) = looking
    lane._look_ahead()
    catalog.remove_file(files[0].id, "t")
    lane._look_ahead()
    lane._look_ahead()
    assert lane._actor.told == ["a" * 64, None, "b" * 64]


def test_a_lane_claims_the_video_that_its_worker_has_decoded(looking):
    _, _, lanes = looking
    for lane in lanes:
        lane._look_ahead()
    ran, work = [], lanes[1]._work

    def stop_after_one(jobs):
        ran.extend(job.video for job in jobs.values())
        work.finishing.set()

    lanes[1]._run = stop_after_one
    lanes[1].run()
    assert ran == ["b" * 64]
    assert lanes[1]._actor.told == ["b" * 64]
    assert work.ahead == {0: "a" * 64}


def test_a_video_that_another_pool_took_is_dropped(looking):
    catalog, files, (lane, _) = looking
    lane._look_ahead()
    for _ in files:
        catalog.claim_jobs(1)
    lane._woken.wait = lambda _seconds: lane._work.finishing.set()
    lane.run()
    assert lane._actor.told == ["a" * 64, None]


def test_workers_that_stop_or_read_chunks_decode_nothing_ahead(looking):
    _, _, (lane, other) = looking
    lane._work.finishing.set()
    lane._look_ahead()
    other._work = replace(other._work, looks_ahead=False, finishing=threading.Event())
    other._look_ahead()
    assert lane._actor.told == other._actor.told == []
