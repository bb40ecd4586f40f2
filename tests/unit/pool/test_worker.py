"""What one worker does with several videos at a time, in this process."""

import hashlib
import shutil

import pytest
import torch

from f2l_vllm.pool.messages import Failed, Published, WorkerSpec
from f2l_vllm.pool.worker import HypernetworkWorker
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
