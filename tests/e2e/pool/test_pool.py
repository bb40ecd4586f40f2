"""The pool with real Ray actors, real mp4 files and real kills."""

import hashlib
import os
import resource
import shutil
import signal
import sqlite3
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.hypernetwork.peft_format import validate_adapter
from f2l_vllm.pool.actors import Actors
from f2l_vllm.pool.config import PoolConfig
from f2l_vllm.pool.messages import Cancelled, Failed, Progress, Published, WorkerSpec
from f2l_vllm.pool.pool import Pool
from f2l_vllm.store.store import Store
from f2l_vllm.video.reading import ReadingOptions
from tests.support.videos import write_video

WAIT_SECONDS = 180
LANE_SECONDS = 30.0  # the next pool in this process needs a Ray of its own, so a late lane is waited for here
AGAIN_SECONDS = 0.2  # until a lane tries again what a catalog or a store refused
BUSY_SECONDS = 1.0  # as long as a transaction waits for its turn


def until(condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Bench:
    """A data folder with a pool of two workers over a random model."""

    def __init__(self, home, model, workers=2, batch=1):
        self.store = Store(home)
        self.catalog = Catalog(f"sqlite:///{home / 'catalog.sqlite3'}", BUSY_SECONDS)
        self.events = []
        self.shapes = BaseShapes.read(model)
        self.spec = WorkerSpec(
            model=model,
            hypernetwork=model / "hypernetwork",
            home=home,
            base_name="base",
            max_rank=64,
            threads=1,
            batch_tokens=4096,
        )
        config = PoolConfig(workers, cpus=0.5, gpus=0, ray_address=None, job_attempts=3, job_seconds=120, batch=batch)
        self.pool = Pool(config, Actors(config, self.spec), self.catalog, self.store, self.events.append)

    def add(self, path, name=None):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        temporary = self.store.temporary()
        shutil.copy(path, temporary)
        self.store.keep_video(temporary, sha256)
        upload = Upload("t", sha256, path.stat().st_size, path.name, "vision")
        return self.catalog.add_file(upload, name or f"f2l-{sha256[:16]}", queue_limit=100)

    def wait(self, record, *states):
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            found = self.catalog.file(record.id, "t")
            if found.state in states:
                return found
            time.sleep(0.002)
        raise AssertionError(f"{found.state} after {WAIT_SECONDS} s, expected one of {states}")

    def workers_with_decoders(self, paths):
        """Two workers that have decoded something before: a decoder is started with a worker's first video."""
        rounds = 0
        while len(decoders(*self.pids(2))) < 2:
            for record in [self.add(path, name=f"f2l-first-{rounds}-{i}") for i, path in enumerate(paths)]:
                self.wait(record, VideoState.PROCESSED)
            rounds += 1
        return self.pids(2)

    def published(self):
        return sum(isinstance(event, Published) for event in self.events)

    def pids(self, count):
        deadline = time.monotonic() + WAIT_SECONDS
        while len(self.pool.workers()) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        pids = {worker.pid for worker in self.pool.workers()}
        assert len(pids) == count
        return pids


@pytest.fixture(scope="module", autouse=True)
def _lanes():
    """They are waited for, and wait less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("f2l_vllm.pool.pool._LANE_SECONDS", LANE_SECONDS)
        for name in ("_RESTART_SECONDS", "_UNAVAILABLE_SECONDS"):
            patch.setattr(f"f2l_vllm.pool.lane.{name}", AGAIN_SECONDS)
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    short = [write_video(folder / f"{index}.mp4", frames=20 + index) for index in range(4)]
    # Seconds of decoding: one key frame, and the last sampled frame is near the end.
    options = {"preset": "ultrafast", "g": "100000"}
    long = write_video(folder / "long.mp4", frames=1200, fps=30, size=(960, 540), options=options)
    return short, long


@pytest.fixture(scope="module")
def bench(tmp_path_factory, hypernetwork_model):
    bench = Bench(tmp_path_factory.mktemp("pool"), hypernetwork_model)
    assert bench.pool.start()
    yield bench
    bench.pool.stop()


def test_videos_become_checked_adapters(bench, videos):
    records = [bench.add(path) for path in videos[0]]
    for record in records:
        bench.wait(record, VideoState.PROCESSED)
        adapter = bench.catalog.adapter(record.adapter_name)
        directory = bench.store.adapter_path(adapter.object)
        files = validate_adapter(directory, bench.shapes)
        assert (adapter.rank, adapter.bytes) == (files.rank, files.bytes)
        assert adapter.info.frames > 0
        assert bench.store.verify_adapter(adapter.object)["info"] == adapter.info.to_json()
    assert sum(isinstance(event, Published) for event in bench.events) >= len(records)


def test_every_worker_is_a_process_of_its_own(bench):
    pids = bench.pids(2)
    assert os.getpid() not in pids


def test_a_bad_video_fails_once_with_its_reason(bench, tmp_path):
    path = tmp_path / "bad.mp4"
    path.write_bytes(b"\0" * 5000)
    found = bench.wait(bench.add(path), VideoState.ERROR)
    assert found.error_code == "not_a_video"
    assert any(isinstance(event, Failed) for event in bench.events)


def test_only_one_pool_serves_a_data_folder(bench, hypernetwork_model):
    other = Bench(bench.store.home, hypernetwork_model)
    assert not other.pool.start()
    other.pool.stop()  # not its to stop
    assert bench.pids(2)


def test_a_video_deleted_while_in_work_leaves_nothing(bench, videos):
    record = bench.add(videos[1], name="f2l-deleted")
    bench.wait(record, VideoState.DECODING)
    bench.catalog.remove_file(record.id, "t")
    deadline = time.monotonic() + WAIT_SECONDS
    while bench.catalog.counts()[2] and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    assert bench.catalog.adapter("f2l-deleted") is None
    assert list((bench.store.home / "adapters").glob("f2l-deleted*")) == []


def decoders(*workers):
    """The decoding processes of these workers."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent in workers and "decoder_child" in (entry / "cmdline").read_text():
                found.add(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@contextmanager
def hanging_decoders(*workers):
    """Whatever these workers decode takes for ever."""
    stopped = decoders(*workers)
    assert len(stopped) == len(workers)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_videos_deleted_while_in_work_free_their_workers_soon(bench, videos):
    """Both workers hang; deleting their videos is enough, and costs no worker."""
    before = bench.workers_with_decoders(videos[0])
    with hanging_decoders(*before):
        hanging = [bench.add(videos[0][0], name=f"f2l-hanging-{i}") for i in range(2)]
        for record in hanging:
            bench.wait(record, VideoState.DECODING)
        waiting = bench.add(videos[0][1], name="f2l-behind")
        for record in hanging:
            bench.catalog.remove_file(record.id, "t")
        bench.wait(waiting, VideoState.PROCESSED)
    assert bench.pids(2) == before
    deadline = time.monotonic() + WAIT_SECONDS
    while bench.catalog.counts()[1:] != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert bench.catalog.counts()[1:] == (0, 0)


def test_a_decoder_that_is_killed_costs_neither_video_nor_worker(bench, videos):
    before = bench.pids(2)
    for child in decoders(*before):
        os.kill(child, signal.SIGKILL)
    for i, path in enumerate(videos[0]):
        bench.wait(bench.add(path, name=f"f2l-after-kill-{i}"), VideoState.PROCESSED)
    assert bench.pids(2) == before


def test_a_locked_catalog_delays_a_result_and_costs_no_worker(bench, videos):
    before, published = bench.workers_with_decoders(videos[0]), bench.published()
    other = sqlite3.connect(bench.store.home / "catalog.sqlite3", isolation_level=None)
    with hanging_decoders(*before):
        record = bench.add(videos[0][0], name="f2l-locked")
        bench.wait(record, VideoState.DECODING)
        other.execute("BEGIN EXCLUSIVE")
    until(lambda: bench.published() == published + 1)
    time.sleep(2 * BUSY_SECONDS)  # while it cannot be entered
    assert bench.catalog.file(record.id, "t").state is VideoState.DECODING
    other.execute("ROLLBACK")
    bench.wait(record, VideoState.PROCESSED)
    assert bench.published() == published + 1  # done once
    assert bench.pids(2) == before
    other.close()


def test_a_store_without_room_delays_a_job_and_costs_no_attempt(bench, videos):
    before = bench.pids(2)
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in before}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, hard))
    bench.events.clear()
    record = bench.add(videos[0][0], name="f2l-no-room")
    until(lambda: sum(event == Progress(VideoState.PUBLISHING, 0.0) for event in bench.events) == 4)  # a job has 3
    for pid, limit in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    bench.wait(record, VideoState.PROCESSED)
    assert bench.pids(2) == before


def test_an_adapter_without_effect_is_an_error_not_a_silent_base_answer(bench, videos):
    """The proof of a worker: the same code in this process, over a hypernetwork whose adapters are zero."""
    from f2l_vllm.hypernetwork.adapter import Adapter
    from f2l_vllm.pool.worker import HypernetworkWorker

    worker = HypernetworkWorker(bench.spec)
    make = worker._internalizer.internalize_frames

    def without_effect(*arguments):
        adapter = make(*arguments)
        return Adapter({name: (a, b * 0) for name, (a, b) in adapter.factors.items()}, adapter.scale, info=adapter.info)

    worker._internalizer.internalize_frames = without_effect
    record = bench.add(videos[0][0])
    *_, (_, outcome) = worker.internalize([("f2l-zero", record.sha256)])
    assert isinstance(outcome, Failed)
    assert outcome.code == "adapter_rejected"
    assert "base model" in outcome.message
    assert not bench.store.adapter_path("f2l-zero").exists()
    worker._internalizer.internalize_frames = make
    *_, (_, outcome) = worker.internalize([("f2l-one", record.sha256)])
    assert isinstance(outcome, Published)
    assert outcome.info.probe_effect > 0.01
    worker._decoder.close()


def test_jobs_taken_together_end_each_on_its_own_and_equal_alone(tmp_path, hypernetwork_model, videos, bench):
    """The last to use the module's pool: one private Ray per process."""
    (tmp_path / "home").mkdir()
    expected = {path: load_file(weights_of(bench, bench.add(path))) for path in videos[0]}
    bench.pool.stop()
    together = Bench(tmp_path / "home", hypernetwork_model, workers=1, batch=8)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"\0" * 5000)
    records = {path: together.add(path) for path in [*videos[0][:2], bad, *videos[0][2:]]}
    assert together.pool.start()
    try:
        assert together.wait(records[bad], VideoState.ERROR).error_code == "not_a_video"
        for path, tensors in expected.items():
            together.wait(records[path], VideoState.PROCESSED)
            found = load_file(weights_of(together, records[path]))
            for key, tensor in tensors.items():
                torch.testing.assert_close(found[key].float(), tensor.float(), rtol=0.02, atol=2e-3)  # bf16 files
        # A worker that dies over several videos loses none, and each is tried again alone.
        (pid,) = together.pids(1)
        again = [together.add(path, name=f"f2l-again-{i}") for i, path in enumerate([videos[1], *videos[0]])]
        together.wait(again[0], VideoState.DECODING)
        os.kill(pid, signal.SIGKILL)
        for record in again:
            together.wait(record, VideoState.PROCESSED)
    finally:
        together.pool.stop()


def test_a_video_deleted_while_its_chunks_are_read_is_given_up(tmp_path, hypernetwork_model, videos):
    """Its bytes go at once, and the next chunk finds none: no fault of the worker's."""
    from f2l_vllm.pool.worker import HypernetworkWorker

    bench = Bench(tmp_path, hypernetwork_model)
    record = bench.add(videos[1])
    worker = HypernetworkWorker(replace(bench.spec, reading=ReadingOptions(chunk_frames=6, max_chunks=7)))
    events = []
    for _, event in worker.internalize([("f2l-deleted", record.sha256)]):
        events.append(event)
        if isinstance(event, Progress) and event.fraction > 0:
            bench.store.remove_video(record.sha256)
    worker._decoder.close()
    assert len(events) > 1
    assert isinstance(events[-1], Cancelled)


def weights_of(bench, record):
    bench.wait(record, VideoState.PROCESSED)
    adapter = bench.catalog.adapter(record.adapter_name)
    return bench.store.adapter_path(adapter.object) / "adapter_model.safetensors"
