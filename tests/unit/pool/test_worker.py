"""What one worker does with several videos at a time, and ahead of their jobs, in this process."""

import gc
import hashlib
import os
import shutil
import threading
import weakref

import pytest
import torch

from f2l_vllm.catalog.tombstones import LOST
from f2l_vllm.pool.messages import Cancelled, Failed, Published, WorkerSpec
from f2l_vllm.pool.worker import HypernetworkWorker
from f2l_vllm.store.cached_store import open_store
from f2l_vllm.store.store import Store
from tests.support.videos import write_video


@pytest.fixture
def worker(hypernetwork_model, tmp_path):
    spec = WorkerSpec(
        model=hypernetwork_model,
        hypernetwork=hypernetwork_model / "hypernetwork",
        home=tmp_path / "home",
        base_name="base",
        max_rank=64,
        threads=1,
        batch_tokens=100_000,
    )
    made = HypernetworkWorker(spec)
    yield made
    made._decoder.close()


def test_a_video_too_large_for_the_workers_gpu_fails_once_and_the_next_is_made(worker, tmp_path, monkeypatch):
    path, store = write_video(tmp_path / "v.mp4", frames=10, fps=2), Store(tmp_path / "home")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    copy = store.temporary()
    shutil.copy(path, copy)
    store.keep_video(copy, sha256)

    def too_large(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patched:
        patched.setattr(worker._internalizer.encoder, "read", too_large)
        *_, (_, failed) = worker.internalize([("f2l-1", sha256)])
    assert isinstance(failed, Failed)
    assert failed.code == "not_enough_memory"
    *_, (_, published) = worker.internalize([("f2l-1", sha256)])
    assert isinstance(published, Published)


def test_a_video_too_long_for_the_model_fails_alone_and_the_others_go_on(worker, tmp_path):
    jobs, lengths = [], []
    store, internalizer = Store(tmp_path / "home"), worker._internalizer
    for index, frames in enumerate([10, 80, 12]):
        path = write_video(tmp_path / f"{index}.mp4", frames=frames, fps=2)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        lengths.append(internalizer.internalize(path).info.prompt_tokens)
        copy = store.temporary()
        shutil.copy(path, copy)
        store.keep_video(copy, sha256)
        jobs.append((f"f2l-{index}", sha256))
    internalizer.model.config.text_config.max_position_embeddings = lengths[1] - 1
    outcomes = {name: event for name, event in worker.internalize(jobs) if isinstance(event, Failed | Published)}
    assert isinstance(outcomes["f2l-0"], Published)
    assert isinstance(outcomes["f2l-2"], Published)
    assert outcomes["f2l-1"].code == "video_too_long"
    assert str(lengths[1]) in outcomes["f2l-1"].message


def keep(store, path):
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    copy = store.temporary()
    shutil.copy(path, copy)
    store.keep_video(copy, sha256)
    return sha256


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


@pytest.fixture
def asked(worker, monkeypatch):
    """The files whose frames the decoder was asked for."""
    found, frames = [], worker._decoder.frames

    def note(path, *arguments):
        found.append(path.name)
        return frames(path, *arguments)

    monkeypatch.setattr(worker._decoder, "frames", note)
    return found


def outcome(worker, name, video):
    *_, (_, event) = worker.internalize([(name, video)])
    return event


def begun(worker):
    """Wait until what is decoded ahead is there."""
    worker._videos._ahead.future.exception(60)


def test_the_next_video_is_decoded_while_the_models_read_and_its_adapter_is_the_same(
    worker, store, asked, tmp_path, monkeypatch
):
    first, second = (keep(store, write_video(tmp_path / f"{n}.mp4", frames=10 + n, fps=2)) for n in range(2))
    expected = outcome(worker, "f2l-expected", second)
    asked.clear()
    see = worker._internalizer.encoder.see

    def after_a_look_ahead(sampled):
        worker.look_ahead(second)
        begun(worker)  # before the models have read anything
        return see(sampled)

    with monkeypatch.context() as patched:
        patched.setattr(worker._internalizer.encoder, "see", after_a_look_ahead)
        assert isinstance(outcome(worker, "f2l-first", first), Published)
    assert asked == [first, second]
    made = outcome(worker, "f2l-second", second)
    assert asked == [first, second]
    assert made.info.timestamps == expected.info.timestamps
    assert set(made.info.seconds) == set(expected.info.seconds)
    weights = [store.adapter_path(name) / "adapter_model.safetensors" for name in ("f2l-second", "f2l-expected")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_bad_video_ahead_fails_in_its_own_job(worker, store, tmp_path):
    good = keep(store, write_video(tmp_path / "good.mp4", frames=10, fps=2))
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:1000])
    bad = keep(store, tmp_path / "bad.mp4")
    worker.look_ahead(bad)
    begun(worker)
    jobs = [("f2l-good", good), ("f2l-bad", bad)]
    ends = {name: event for name, event in worker.internalize(jobs) if isinstance(event, Failed | Published)}
    assert isinstance(ends["f2l-good"], Published)
    assert ends["f2l-bad"].code == "truncated_video"
    worker.look_ahead(bad)
    assert isinstance(outcome(worker, "f2l-again", good), Published)


def test_a_video_deleted_while_it_is_ahead_is_held_no_longer(worker, store, asked, tmp_path):
    video = keep(store, write_video(tmp_path / "v.mp4", frames=10, fps=2))
    worker.look_ahead(video)
    begun(worker)
    frames = weakref.ref(worker._videos._ahead.future.result().frames)
    store.remove_video(video)
    worker.look_ahead(None)
    gc.collect()
    assert frames() is None
    failed = outcome(worker, "f2l-v", video)
    assert (failed.code, asked) == (LOST, [video])


def test_a_video_deleted_before_it_is_decoded_ahead_costs_nothing(worker, store, tmp_path):
    video = keep(store, write_video(tmp_path / "v.mp4", frames=10, fps=2))
    store.remove_video(video)
    worker.look_ahead(video)
    begun(worker)
    keep(store, tmp_path / "v.mp4")
    assert isinstance(outcome(worker, "f2l-v", video), Published)


def test_frames_larger_than_may_be_held_are_decoded_in_their_job(worker, store, asked, tmp_path, monkeypatch):
    video = keep(store, write_video(tmp_path / "v.mp4", frames=10, fps=2))
    monkeypatch.setattr("f2l_vllm.pool.worker.AHEAD_BYTES", 1000)
    worker.look_ahead(video)
    begun(worker)
    assert asked == []
    assert isinstance(outcome(worker, "f2l-v", video), Published)
    assert asked == [video]


def test_a_job_cancelled_while_its_video_is_decoded_ahead_ends_and_the_next_is_made(
    worker, store, tmp_path, monkeypatch
):
    video = keep(store, write_video(tmp_path / "v.mp4", frames=10, fps=2))
    os.mkfifo(store.video_path("0" * 64).parent.parent / "fifo")
    stuck, opens = "0" * 64, worker._decoder.open
    store.video_path(stuck).parent.mkdir(exist_ok=True)
    store.video_path(stuck).write_bytes(b"x")
    fifo = store.video_path(stuck).parent.parent / "fifo"
    monkeypatch.setattr(  # whoever opens it waits for ever
        worker._decoder, "open", lambda path, limits: opens(fifo if path.name == stuck else path, limits)
    )
    worker.look_ahead(stuck)
    events, ended = worker.internalize([("f2l-stuck", stuck)]), []
    assert next(events)[1].state == "decoding"
    job = threading.Thread(target=lambda: ended.append(list(events)[-1][1]))
    job.start()
    while job.is_alive():
        worker.cancel("f2l-stuck")
        job.join(0.05)
    assert isinstance(ended[0], Cancelled)
    assert isinstance(outcome(worker, "f2l-v", video), Published)


def test_a_video_that_is_not_here_is_fetched_by_its_job_alone(worker, tmp_path, monkeypatch):
    """What a job fetches is dropped with it, if it was deleted meanwhile."""
    far = open_store(tmp_path / "other", url=f"file://{tmp_path / 'far'}")
    video = keep(far, write_video(tmp_path / "v.mp4", frames=10, fps=2))
    here = open_store(tmp_path / "home", url=f"file://{tmp_path / 'far'}")
    monkeypatch.setattr(worker, "_store", here)
    worker.look_ahead(video)
    begun(worker)
    assert not here.video_path(video).exists()
    assert isinstance(outcome(worker, "f2l-v", video), Published)
    assert here.video_path(video).exists()


def test_what_was_decoded_ahead_is_let_go_when_another_job_begins(worker, store, tmp_path):
    first, second = (keep(store, write_video(tmp_path / f"{n}.mp4", frames=10 + n, fps=2)) for n in range(2))
    worker.look_ahead(first)
    begun(worker)
    frames = weakref.ref(worker._videos._ahead.future.result().frames)
    assert isinstance(outcome(worker, "f2l-second", second), Published)
    gc.collect()
    assert frames() is None
