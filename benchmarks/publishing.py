"""`python -m benchmarks.publishing`: where the time goes from the models' last result to the first token of an answer.

`stages`: a worker in this process makes adapters of real files into a data folder on disk; then the catalog enters
them, and a server's store checks an adapter and reads it as the engine does, all step by step. `first_token`: a real
server is sent a new video and a question about it at once; the time counts from the upload to the first token. Arms
are the data folder: on the disk, and on /dev/shm, where writing, syncing and renaming cost what handing an adapter over
in memory and writing its files behind would at best. The second arm is an upper bound of that gain: the uploaded
video and the catalog's commits are in memory too. Servers run one at a time and take turns. With `--no-models` only
what depends on an adapter's size is measured, with random values.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

from f2l_vllm import torch_shims

torch_shims.install()

import torch  # noqa: E402
from openai import OpenAI  # noqa: E402

from benchmarks.memory_tier import load  # noqa: E402
from benchmarks.worker_manager import random_adapter  # noqa: E402
from f2l_vllm.bench import record  # noqa: E402
from f2l_vllm.bench.hypernetwork_shapes import SHAPES, random_hypernetwork, save_model, save_released  # noqa: E402
from f2l_vllm.catalog.catalog import Catalog  # noqa: E402
from f2l_vllm.catalog.tables import Upload  # noqa: E402
from f2l_vllm.client import ask  # noqa: E402
from f2l_vllm.models import DEFAULT_MODEL, resolve  # noqa: E402
from f2l_vllm.pool.messages import Published, WorkerSpec  # noqa: E402
from f2l_vllm.pool.worker import HypernetworkWorker  # noqa: E402
from f2l_vllm.server_process import ServerProcess  # noqa: E402
from f2l_vllm.store.cached_store import open_store  # noqa: E402
from f2l_vllm.store.store import Store  # noqa: E402
from f2l_vllm.synthetic.render import write_mp4  # noqa: E402
from f2l_vllm.synthetic.world import sample_scenes  # noqa: E402
from f2l_vllm.video.reading import ReadingOptions  # noqa: E402

TINY = "f2l-tiny"
MEMORY = Path("/dev/shm")
QUESTION = "Describe the video."
STEPS = {  # of publishing, by the function that does it
    "f2l_vllm.hypernetwork.adapter_check.AdapterCheck.check": "check",
    "f2l_vllm.hypernetwork.adapter.Adapter.save": "serialise, write",
    "f2l_vllm.hypernetwork.peft_format.validate_adapter": "read, validate, hash",
    "f2l_vllm.store.manifest.write": "manifest",
    "f2l_vllm.store.store.sync": "fsync",
    "f2l_vllm.store.store.Store.publish_adapter": "publish",
}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default=TINY, choices=[TINY, *SHAPES])
    parser.add_argument("--frames", type=int, default=12, help="of each video, one a second")
    parser.add_argument("--videos", type=int, default=20, help="of each server, after one that warms it up")
    parser.add_argument("--rounds", type=int, default=2, help="servers of each arm")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a worker")
    parser.add_argument("--no-models", action="store_true", help="only write and read adapters of random values")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="f2l-bench-") as name:
        folder = Path(name)
        if options.no_models:
            results: dict[str, Any] = {"stages_ms": files_alone(folder / "home", options)}
            print(results)
            if options.json is not None:
                record.write(options.json, {**vars(options), "json": None}, results)
            return
        model, hypernetwork = inputs(options.shape, folder)
        films = films_of(folder, options)
        results = {
            "stages_ms": stages(folder / "home", model, hypernetwork, films[: options.videos + 1], options),
            "first_token_ms": first_token(folder, model, hypernetwork, films, options),
        }
    print(results)
    if options.json is not None:
        record.write(options.json, {**vars(options), "json": None}, results)


def inputs(shape: str, folder: Path) -> tuple[Path, Path]:
    """The base model and the hypernetwork, on disk."""
    if shape == TINY:
        model = resolve(DEFAULT_MODEL)
        return model, model / "hypernetwork"
    model = save_model(SHAPES[shape], folder / "model")
    hyper = random_hypernetwork(SHAPES[shape].hypernetwork, torch.bfloat16)
    return model, save_released(hyper, folder / "hypernetwork.pt")


def films_of(folder: Path, options: argparse.Namespace) -> list[Path]:
    """Different files, enough for all servers."""
    count = 2 * options.rounds * (options.videos + 1)
    return [
        write_mp4(scene, folder / f"{index}.mp4", size=(640, 360), fps=1, seconds=options.frames)
        for index, scene in enumerate(sample_scenes(count, seed=1))
    ]


class Steps:
    """Milliseconds of each step, video by video."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self.videos: list[dict[str, float]] = []

    def around(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted as `step`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.step(step):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count what runs within as this step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (time.perf_counter() - started)

    def next(self) -> None:
        """The video is done."""
        self.videos.append(self.ms)
        self.ms = {}

    def summary(self) -> dict[str, Any]:
        """Medians and ranges over the videos after the first."""
        some = self.videos[1:]
        return {name: _summary([video[name] for video in some]) for name in some[0]}


def stages(
    home: Path, model: Path, hypernetwork: Path, films: list[Path], options: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of each step from the models' last result to weights in a block of memory."""
    spec = WorkerSpec(
        model=model,
        hypernetwork=hypernetwork,
        home=home,
        base_name=model.name,
        max_rank=64,
        threads=options.threads,
        reading=ReadingOptions(max_frames=options.frames, fps=1),
    )
    worker, store = HypernetworkWorker(spec), Store(home)
    server = open_store(home, hot_bytes=256 << 20)
    catalog = Catalog(f"sqlite:///{home / 'catalog.sqlite3'}")
    steps = Steps()
    with ExitStack() as stack:
        for path, step in STEPS.items():
            module, _, name = path.rpartition(".")
            owner = _find(module)
            stack.enter_context(patch.object(owner, name, steps.around(step, getattr(owner, name))))
        for film in films:
            video = sha256(film.read_bytes()).hexdigest()
            copy = store.temporary()
            shutil.copy(film, copy)
            store.keep_video(copy, video)
            upload = Upload("t", video, film.stat().st_size, film.name, "vision")
            catalog.add_file(upload, f"f2l-{video[:16]}", queue_limit=2)
            (job,) = catalog.claim_jobs(1)
            steps.ms.clear()
            for _, event in worker.internalize([(job.object, job.video)]):
                done = event
            assert isinstance(done, Published), done
            steps.ms["in all, from decoding"] = 1e3 * done.info.internalize_seconds + sum(
                steps.ms[name] for name in ("check", "publish")
            )
            with steps.step("catalog commit"):
                catalog.finish_job(job.adapter_name, rank=done.rank, size=done.bytes, info=done.info, token=job.token)
            with steps.step("server: compare with the manifest, read"):
                load(server, job.object)
            steps.next()
    worker._decoder.close()
    server.close()
    catalog.close()
    return {**steps.summary(), "adapter_bytes": done.bytes}


def files_alone(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the steps that depend on an adapter's size alone; hashes are computed with the manifest."""
    config = SHAPES[options.shape].hypernetwork
    adapter, store, steps = random_adapter(config, 2 * config.rank), Store(home), Steps()
    server = open_store(home, hot_bytes=256 << 20)
    with ExitStack() as stack:
        for path, step in STEPS.items():
            module, _, name = path.rpartition(".")
            owner = _find(module)
            stack.enter_context(patch.object(owner, name, steps.around(step, getattr(owner, name))))
        for number in range(options.videos + 1):
            name = f"f2l-{number:032x}"
            store.publish_adapter(name, lambda directory: adapter.save(directory, "base") and None, {})
            with steps.step("server: compare with the manifest, read"):
                size = load(server, name)
            steps.next()
    server.close()
    return {**steps.summary(), "weights_bytes": size}


def _find(path: str) -> Any:
    """A module, or a class in one."""
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def first_token(
    folder: Path, model: Path, hypernetwork: Path, films: list[Path], options: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds from upload to first token, by where the data folder is."""
    found: dict[str, list[float]] = {"disk": [], "memory": []}
    unused = iter(films)
    flags = ["--max-frames", str(options.frames), "--fps", "1", "--worker-cpus", str(options.threads)]
    if options.shape != TINY:
        flags += ["--hypernetwork", str(hypernetwork), "--dtype", "bfloat16", "--max-model-len", "4096"]
    for number in range(options.rounds):
        for arm in found if number % 2 == 0 else reversed(found):
            with tempfile.TemporaryDirectory(prefix="f2l-bench-", dir=MEMORY if arm == "memory" else folder) as name:
                # "shipped" models go by name, others by path
                server = ServerProcess(TINY if options.shape == TINY else str(model), Path(name) / "home", *flags)
                try:
                    server.wait_ready()
                    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
                    for index in range(options.videos + 1):
                        started = time.perf_counter()
                        file = client.files.create(file=next(unused), purpose="vision")
                        before = time.perf_counter() - started
                        answer = ask(client, file.id, QUESTION, 48)
                        if index:  # the first pays for warm-up
                            found[arm].append(1e3 * (before + answer.ttft))
                finally:
                    server.stop()
    medians = {arm: statistics.median(some) for arm, some in found.items()}
    return {
        **{arm: {**_summary(some), "all": [round(value, 1) for value in some]} for arm, some in found.items()},
        "disk_minus_memory": round(medians["disk"] - medians["memory"], 1),
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
        "n": len(values),
    }


if __name__ == "__main__":
    main()
