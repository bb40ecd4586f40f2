"""`python -m benchmarks.decode_ahead`: what a worker gains by decoding the next video while it reads one.

A pool with one worker on real files, entered in the catalog as uploads are, one right after the other. Arms take turns,
one round each, with the same worker: with and without looking ahead. Beside it the CPU time that preparing a frame
takes on one thread: by the video processor's own call, and by the family's `prepare_frames`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from f2l_vllm import torch_shims

torch_shims.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoProcessor  # noqa: E402

from f2l_vllm.base_models.smolvlm import prepare_frames  # noqa: E402
from f2l_vllm.bench import record  # noqa: E402
from f2l_vllm.catalog.catalog import Catalog  # noqa: E402
from f2l_vllm.catalog.tables import Upload  # noqa: E402
from f2l_vllm.models import DEFAULT_MODEL, resolve  # noqa: E402
from f2l_vllm.pool.actors import Actors  # noqa: E402
from f2l_vllm.pool.config import PoolConfig  # noqa: E402
from f2l_vllm.pool.messages import Event, Published, WorkerSpec  # noqa: E402
from f2l_vllm.pool.pool import Pool  # noqa: E402
from f2l_vllm.store.store import Store  # noqa: E402
from f2l_vllm.synthetic.render import write_mp4  # noqa: E402
from f2l_vllm.synthetic.world import sample_scenes  # noqa: E402

ARMS = {"without": False, "with": True}
_MOST_SECONDS = 600.0
_WARM = 8  # videos of each arm before the first round
_EDGES = (32, 512)  # squares of f2l-tiny and of SmolVLM2-500M


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 360), help="width and height")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each video, at 12 frames a second")
    parser.add_argument("--rounds", type=int, default=5, help="of each arm")
    parser.add_argument("--threads", type=int, default=1, help="of the worker")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="f2l-bench-") as name:
        results = {"worker": throughput(Path(name), options), "frames": preparation(tuple(options.size))}
    print(results)
    if options.json is not None:
        record.write(options.json, {"model": DEFAULT_MODEL, **vars(options) | {"json": None}}, results)


def throughput(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Videos per second of each arm, round by round."""
    model, store = resolve(DEFAULT_MODEL), Store(home)
    spec = WorkerSpec(
        model=model,
        hypernetwork=model / "hypernetwork",
        home=home,
        base_name=DEFAULT_MODEL,
        max_rank=64,
        threads=options.threads,
    )
    config = PoolConfig(1, cpus=1, gpus=0, ray_address=None, job_attempts=1, job_seconds=_MOST_SECONDS)
    catalog = Catalog(f"sqlite:///{home / 'catalog.sqlite3'}")
    ended, events = threading.Condition(), []

    def on_event(event: Event) -> None:
        if not hasattr(event, "state"):
            with ended:
                events.append(event)
                ended.notify()

    pool = Pool(config, Actors(config, spec), catalog, store, on_event)
    hashes = videos(store, home, options)
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    decoding: dict[str, list[float]] = {arm: [] for arm in ARMS}
    assert pool.start()
    (lane,) = pool._lanes
    try:
        for number in range(-1, options.rounds):
            for arm in ARMS if number % 2 else reversed(ARMS):
                lane._work = replace(lane._work, looks_ahead=ARMS[arm])
                with ended:
                    events.clear()
                    started = time.perf_counter()
                    some = hashes if number >= 0 else hashes[:_WARM]
                    enter(catalog, some, f"{number + 1}-{arm}")
                    assert ended.wait_for(lambda some=some: len(events) == len(some), _MOST_SECONDS)
                    seconds = time.perf_counter() - started
                assert all(isinstance(event, Published) for event in events), events
                if number >= 0:  # the one before warms up
                    rates[arm].append(round(len(hashes) / seconds, 2))
                    decoding[arm] += [event.info.seconds["decode"] for event in events if isinstance(event, Published)]
    finally:
        pool.stop()
    medians = {arm: statistics.median(some) for arm, some in rates.items()}
    return {
        "videos_per_second": rates,
        "median_videos_per_second": medians,
        "with_over_without": round(medians["with"] / medians["without"], 3),
        "median_decode_ms": {arm: round(1e3 * statistics.median(some), 1) for arm, some in decoding.items()},
        "median_of_paired_ratios": round(
            statistics.median(a / b for a, b in zip(rates["with"], rates["without"], strict=True)), 3
        ),
    }


def videos(store: Store, home: Path, options: argparse.Namespace) -> list[tuple[str, int]]:
    """Hashes and sizes of files in the store."""
    found = []
    for scene in sample_scenes(options.videos, seed=1):
        path = write_mp4(scene, home / "made.mp4", size=tuple(options.size), fps=12, seconds=options.seconds)
        sha256, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
        copy = store.temporary()
        shutil.move(path, copy)
        store.keep_video(copy, sha256)
        found.append((sha256, size))
    return found


def enter(catalog: Catalog, hashes: list[tuple[str, int]], label: str) -> None:
    """Enter all videos under new names."""
    for index, (sha256, size) in enumerate(hashes):
        upload = Upload("t", sha256, size, f"{index}.mp4", "vision")
        catalog.add_file(upload, f"f2l-{label}-{index}", queue_limit=len(hashes))


def preparation(size: tuple[int, int], frames: int = 5, rounds: int = 9) -> dict[str, Any]:
    """Milliseconds of CPU that a frame takes on one thread, by the processor's call and by ours."""
    torch.set_num_threads(1)
    width, height = size
    frames_FHW3 = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    processor = AutoProcessor.from_pretrained(resolve(DEFAULT_MODEL)).video_processor
    result = {}
    for edge in _EDGES:
        processor.max_image_size = {"longest_edge": edge}
        arms: dict[str, Callable[[], Any]] = {
            "processor": lambda edge=edge: processor(
                [frames_FHW3], do_sample_frames=False, return_tensors="pt", size={"longest_edge": edge}
            ),
            "prepare_frames": lambda edge=edge: prepare_frames(processor, torch.from_numpy(frames_FHW3), edge),
        }
        taken: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm, run in arms.items():
                started = time.thread_time()
                run()
                taken[arm].append(1e3 * (time.thread_time() - started) / frames)
        medians = {f"{arm}_cpu_ms": round(statistics.median(some), 2) for arm, some in taken.items()}
        result[f"to {edge} pixels"] = {**medians, "all": {a: [round(v, 2) for v in s] for a, s in taken.items()}}
    return result


if __name__ == "__main__":
    main()
