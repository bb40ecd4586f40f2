"""`python -m benchmarks.internalize`: one long video at SmolVLM2-500M's shape, its seconds and memory stage by stage.

A real mp4 is decoded and read by a random model and hypernetwork of the released shapes, loaded from files as a worker
loads them; the adapter is exported. Memory is the process's high-water mark within each stage, above what it holds
with everything loaded and before the video is opened. It is taken in a second pass: to restart the mark, 64 times,
the kernel goes through all pages of the process, which would be most of the perceiver's seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.hypernetwork import restart_high_water_mark
from f2l_vllm.bench import record
from f2l_vllm.bench.hypernetwork_shapes import SHAPES, random_hypernetwork, save_model, save_released
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.hypernetwork.perceiver import LayerReader
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes
from f2l_vllm.video.sample import Sampling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Peaks:
    """The high-water mark of every stage, in MiB above `base`."""

    def __init__(self, base: float) -> None:
        self.base = base
        self.peak_mib: dict[str, float] = {}

    def around(self, stage: str, between: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its peak counted as `stage` and that of what ran before it as `between`."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.lap(between)
            result = function(*args, **kwargs)
            self.lap(stage)
            return result

        return watched

    def lap(self, stage: str) -> None:
        """What ran since the last lap was `stage`."""
        peak = record.peak_memory_mib(os.getpid()) - self.base
        self.peak_mib[stage] = round(max(self.peak_mib.get(stage, 0.0), peak), 1)
        restart_high_water_mark()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", default="500M", choices=SHAPES)
    parser.add_argument("--frames", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the model; the hypernetwork is fp32")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 360), help="width and height of the video")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="f2l-bench-") as name:
        folder = Path(name)
        model = save_model(shape, folder / "model", DTYPES[options.dtype])
        hyper = save_released(random_hypernetwork(shape.hypernetwork, torch.bfloat16), folder / "hypernetwork.pt")
        internalizer = Internalizer.load(model, hyper)
        warm_up(internalizer, folder)
        for frames in options.frames:
            scene = sample_scenes(1, seed=frames)[0]
            video = write_mp4(scene, folder / f"{frames}.mp4", size=tuple(options.size), fps=4, seconds=frames)
            internalizer.sampling = Sampling(max_frames=frames, fps=1)
            results[f"{frames} frames"] = measure(internalizer, video, folder / f"adapter-{frames}")
    record.write(
        options.json,
        {
            "shape": options.shape,
            "model_dtype": options.dtype,
            "hypernetwork_dtype": "fp32",
            "video_size": options.size,
            "threads": options.threads,
        },
        results,
    )


def warm_up(internalizer: Internalizer, folder: Path) -> None:
    """Have every weight read from its file and every library set up."""
    for parameter in internalizer.model.parameters():
        parameter.sum()
    internalizer.sampling = Sampling(max_frames=1)
    internalizer.internalize(write_mp4(sample_scenes(1, seed=0)[0], folder / "short.mp4", fps=4, seconds=1))


def measure(internalizer: Internalizer, video: Path, target: Path) -> dict[str, Any]:
    """One video, from file to adapter, twice: for the seconds, and for the memory."""
    adapter = internalizer.internalize(video)
    base_model = internalizer.hyper.config.base_model
    started = time.perf_counter()
    adapter.save(target, base_model=base_model)
    seconds = {**adapter.info.seconds, "export": time.perf_counter() - started}
    peaks = peaks_of(internalizer, video, target.with_name(f"{target.name}-again"))
    tokens = adapter.info.prompt_tokens
    hidden = tokens * internalizer.hyper.config.feature_size * next(internalizer.model.parameters()).element_size()
    return {
        "frames": adapter.info.frames,
        "prompt_tokens": tokens,
        "rank": adapter.rank,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "seconds_in_all": round(sum(seconds.values()), 3),
        "peak_above_weights_mib": peaks,
        "text_peak_in_hidden_vectors_per_token": round(peaks["text"] * 2**20 / hidden, 1),
    }


def peaks_of(internalizer: Internalizer, video: Path, target: Path) -> dict[str, float]:
    """The stages' peaks, in MiB above what the process holds before."""
    encoder, hyper = internalizer.encoder, internalizer.hyper
    peaks = Peaks(restart_high_water_mark())
    watched: dict[tuple[Any, str], tuple[str, str]] = {
        (encoder, "see"): ("vision", "decode"),
        (LayerReader, "add"): ("perceiver", "text"),
        (LayerReader, "latents"): ("perceiver", "text"),
        (hyper, "project"): ("head", "perceiver"),
    }
    with ExitStack() as stack:
        for (owner, name), (stage, before) in watched.items():
            function = peaks.around(stage, before, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, function))
        adapter = internalizer.internalize(video)
    adapter.save(target, base_model=hyper.config.base_model)
    peaks.lap("export")
    return peaks.peak_mib


if __name__ == "__main__":
    main()
