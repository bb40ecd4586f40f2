"""Adapters as a worker on this machine's device makes them, against those made on the CPU in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from f2l_vllm.bench.shapes import Subject
from f2l_vllm.doctor.findings import Finding
from f2l_vllm.hypernetwork.adapter import Adapter, apart
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.pool.device import take_device
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes

ALLOWED = 0.02  # of what the adapter adds to the weights; the golden videos differ by 0.014 at most
_SEED = 11


@dataclass(frozen=True)
class Made:
    """Three videos, and their adapters as a worker makes them here."""

    videos: dict[str, Path]
    adapters: dict[str, Adapter]
    folders: dict[str, Path]


def make(subject: Subject, folder: Path, has_gpu: bool) -> tuple[Made, Finding]:
    """Have three videos read twice: by the device in its precision, and on the CPU in fp32.

    On a machine without a GPU the first is the CPU in bf16, as a GPU reads.
    """
    scenes = sample_scenes(3, _SEED, "held-out")
    videos = {
        f"video {number}": write_mp4(scene, folder / f"{number}.mp4") for number, scene in enumerate(scenes, start=1)
    }
    with worker_device(has_gpu) as device:
        worker = Internalizer.load(
            subject.directory, subject.hypernetwork, device, dtype=None if has_gpu else torch.bfloat16
        )
        here = {name: worker.internalize(path).to("cpu") for name, path in videos.items()}
        del worker
    exact = Internalizer.load(subject.directory, subject.hypernetwork, "cpu", dtype=torch.float32)
    there = {name: exact.internalize(path) for name, path in videos.items()}
    worst = max(apart(there[name], here[name]) for name in videos)
    folders = {name: folder / f"adapter-{number}" for number, name in enumerate(videos, start=1)}
    for name, path in folders.items():
        here[name].save(path, base_model=exact.hyper.config.base_model)
    where = torch.cuda.get_device_name() if has_gpu else "the CPU in bf16, as a GPU reads"
    trouble = None if worst <= ALLOWED else "this device computes other adapters"
    finding = Finding(
        f"adapters made on {where}",
        f"those made on the CPU in fp32, {len(videos)} videos, rank {next(iter(here.values())).rank}",
        worst,
        ALLOWED,
        "of their effect on the weights",
        trouble,
    )
    return Made(videos, here, folders), finding


@contextmanager
def worker_device(has_gpu: bool) -> Iterator[torch.device]:
    """A worker's device within the block. It sets how the whole process multiplies; what follows computes as before."""
    before = torch.get_float32_matmul_precision()
    try:
        yield take_device(float(has_gpu))
    finally:
        torch.set_float32_matmul_precision(before)
        if has_gpu:
            torch.cuda.empty_cache()
