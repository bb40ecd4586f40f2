"""`python -m benchmarks.internalize`: one long video at SmolVLM2-500M's shape, its seconds and memory stage by stage.

A real mp4 is decoded and read by a random model and hypernetwork of the released shapes, loaded from files as a worker
loads them; the adapter is exported. Memory is the process's high-water mark within each stage, above what it holds
with everything loaded and before the video is opened. It is taken in another pass: to restart the mark, 64 times,
the kernel goes through all pages of the process, which would be most of the perceiver's seconds.

The model is stored in bf16 and computes in each `--dtype`, by default the one that a worker takes on this CPU. With
several, the passes for the seconds take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.hypernetwork import DTYPES, gflops, restart_high_water_mark
from f2l_vllm.bench import record
from f2l_vllm.bench.hypernetwork_shapes import SHAPES, random_hypernetwork, save_model, save_released
from f2l_vllm.hypernetwork.adapter import Adapter
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.hypernetwork.perceiver import LayerReader
from f2l_vllm.hypernetwork.precision import reading_dtype
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes
from f2l_vllm.video.sample import Sampling


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
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="the model computes in; the hypernetwork is fp32")
    parser.add_argument("--rounds", type=int, default=1, help="passes for the seconds, whose medians are written")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 360), help="width and height of the video")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    own = "bf16" if reading_dtype(torch.device("cpu")) is None else "fp32"
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="f2l-bench-") as name:
        folder = Path(name)
        model = save_model(shape, folder / "model", torch.bfloat16)
        hyper = save_released(random_hypernetwork(shape.hypernetwork, torch.bfloat16), folder / "hypernetwork.pt")
        arms = {name: Internalizer.load(model, hyper, "cpu", DTYPES[name]) for name in options.dtype or [own]}
        for internalizer in arms.values():
            warm_up(internalizer, folder)
        for frames in options.frames:
            scene = sample_scenes(1, seed=frames)[0]
            video = write_mp4(scene, folder / f"{frames}.mp4", size=tuple(options.size), fps=4, seconds=frames)
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
            for number in range(options.rounds):
                for name, internalizer in arms.items():
                    internalizer.sampling = Sampling(max_frames=frames, fps=1)
                    target = folder / f"adapter-{frames}-{name}-{number}"
                    taken[name].append(seconds_of(internalizer, video, target))
            for name, internalizer in arms.items():
                key = f"{frames} frames" + (f", {name}" if len(arms) > 1 else "")
                results[key] = measure(internalizer, video, folder / f"adapter-{frames}-{name}", taken[name])
    record.write(
        options.json,
        {
            "shape": options.shape,
            "model_stored_in": "bf16",
            "model_computes_in": options.dtype or [own],
            "worker_computes_in": own,
            "rounds": options.rounds,
            "matrix_product_gflops": {name: gflops(dtype, torch.device("cpu")) for name, dtype in DTYPES.items()},
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


def seconds_of(internalizer: Internalizer, video: Path, target: Path) -> dict[str, float]:
    """One video, from file to adapter: seconds of every stage."""
    adapter = internalizer.internalize(video)
    started = time.perf_counter()
    adapter.save(target, base_model=internalizer.hyper.config.base_model)
    return {**adapter.info.seconds, "export": time.perf_counter() - started}


def measure(internalizer: Internalizer, video: Path, target: Path, taken: list[dict[str, float]]) -> dict[str, Any]:
    """The medians of the seconds that were taken, and what the same video needs of memory."""
    seconds = {stage: statistics.median(one[stage] for one in taken) for stage in taken[0]}
    adapter, peaks = peaks_of(internalizer, video, target)
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


def peaks_of(internalizer: Internalizer, video: Path, target: Path) -> tuple[Adapter, dict[str, float]]:
    """The adapter, and the stages' peaks in MiB above what the process holds before."""
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
    return adapter, peaks.peak_mib


if __name__ == "__main__":
    main()
