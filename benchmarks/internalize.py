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
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.hypernetwork import DTYPES, gflops
from f2l_vllm.bench import internalize, record
from f2l_vllm.bench.hypernetwork_shapes import SHAPES, random_hypernetwork, save_model, save_released
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.hypernetwork.precision import reading_dtype
from f2l_vllm.video.sample import Sampling


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
            internalize.warm_up(internalizer, folder)
        for frames in options.frames:
            video = internalize.film(folder, frames, tuple(options.size))
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
            for number in range(options.rounds):
                for name, internalizer in arms.items():
                    internalizer.sampling = Sampling(max_frames=frames, fps=1)
                    target = folder / f"adapter-{frames}-{name}-{number}"
                    taken[name].append(internalize.seconds_of(internalizer, video, target))
            for name, internalizer in arms.items():
                key = f"{frames} frames" + (f", {name}" if len(arms) > 1 else "")
                results[key] = internalize.measure(
                    internalizer, video, folder / f"adapter-{frames}-{name}", taken[name]
                )
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


if __name__ == "__main__":
    main()
