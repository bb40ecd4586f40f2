"""A worker computes where its specification says, and keeps to its share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from f2l_vllm.pool.device import memory_fraction, take_device
from f2l_vllm.pool.messages import WorkerSpec
from f2l_vllm.pool.worker import HypernetworkWorker
from f2l_vllm.settings import Settings


def spec(model, home, **given) -> WorkerSpec:
    paths = {"model": model, "hypernetwork": model / "hypernetwork"}
    return WorkerSpec.of(Settings(home=home, **given), **paths, rank=4, max_rank=16)


def test_a_worker_told_no_gpu_computes_on_the_cpu_even_where_torch_sees_one(hypernetwork_model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for given in ({}, {"worker_gpus": 0.0}):
        worker = HypernetworkWorker(spec(hypernetwork_model, tmp_path, **given))
        assert worker.info().device == "cpu"
        worker._decoder.close()


def test_a_worker_told_a_gpu_does_not_compute_on_the_cpu_in_silence(hypernetwork_model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="finds none: f2l-vllm doctor says why; with --worker-gpus 0"):
        HypernetworkWorker(spec(hypernetwork_model, tmp_path, worker_gpus=0.3))


@pytest.mark.parametrize(("gpus", "gib", "gib_left"), [(0.3, 24, 6.7), (0.1, 80, 7.5), (0.01, 24, 0.0), (0.5, 8, 3.5)])
def test_torch_and_cuda_together_stay_within_the_share(gpus, gib, gib_left):
    fraction = memory_fraction(gpus, gib << 30)
    assert fraction * gib == pytest.approx(gib_left)
    assert fraction < gpus


def test_a_share_is_kept_and_a_whole_gpu_is_not_limited(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 24 << 30}))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: limits.append(given))
    assert take_device(1.0) == torch.device("cuda", 0)
    assert limits == []
    take_device(0.25)
    assert limits == [(memory_fraction(0.25, 24 << 30), torch.device("cuda", 0))]


@pytest.mark.parametrize(("address", "devices"), [(None, "1,2"), ("auto", "7")])
def test_a_private_ray_is_given_the_workers_gpus(address, devices):
    program = (
        "import os\nfrom f2l_vllm.pool.config import prepare_ray\nfrom f2l_vllm.settings import Settings\n"
        f"prepare_ray(Settings(worker_devices='1,2', ray_address={address!r}))\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == devices
