"""`python -m benchmarks.memory_tier`: what copies of adapters in memory (`F2L_HOT_BYTES`) save, against the page cache.

Adapters of SmolVLM2-500M's shape, random values, in two data folders of which one has the tier. A load asks the store
for a checked path and reads the weights into one block, as the engine does. It is the first since the server started,
which compares every file with its manifest, or a later one, which does not. The files of the arm `disk` are dropped
from the page cache before each load, as after others have needed that memory. Arms take turns adapter by adapter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from f2l_vllm import torch_shims

torch_shims.install()

import torch  # noqa: E402

from benchmarks.worker_manager import random_adapter  # noqa: E402
from f2l_vllm.bench import record  # noqa: E402
from f2l_vllm.bench.hypernetwork_shapes import SHAPES  # noqa: E402
from f2l_vllm.evaluation.percentiles import percentiles  # noqa: E402
from f2l_vllm.hypernetwork.adapter import WEIGHTS_FILE  # noqa: E402
from f2l_vllm.store.cached_store import open_store  # noqa: E402
from f2l_vllm.store.store import Store  # noqa: E402

SHAPE, RANK = "500M", 32
ARMS = ("memory", "page cache", "disk")


def load(store: Store, name: str) -> int:
    """The bytes read."""
    path = store.load_path(name) / WEIGHTS_FILE
    block = memoryview(torch.empty(path.stat().st_size, dtype=torch.uint8).numpy())
    filled = 0
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block[filled:]):
            filled += count
    return filled


def forget(directory: Path) -> None:
    """Drop the files from the page cache."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of first and later loads."""
    homes = {arm: folder / arm.replace(" ", "-") for arm in ARMS}
    names = [f"f2l-{number:032x}" for number in range(count)]
    adapter = random_adapter(SHAPES[SHAPE].hypernetwork, RANK)
    for arm, home in homes.items():
        with_memory = open_store(home, hot_bytes=(4 << 30) if arm == "memory" else 0)
        for name in names:
            with_memory.publish_adapter(name, lambda path: adapter.save(path, "base") and None, {})
        with_memory.close()
    os.sync()  # what is not written yet stays in the page cache
    found: dict[str, dict[str, list[float]]] = {arm: {"first": [], "later": []} for arm in ARMS}
    for _ in range(rounds):
        stores = {arm: open_store(home, hot_bytes=(4 << 30) if arm == "memory" else 0) for arm, home in homes.items()}
        for name in names:
            assert stores["memory"].prepare(name)
        for when in ("first", "later"):
            for index, name in enumerate(names):
                for arm in ARMS[index % 3 :] + ARMS[: index % 3]:
                    if arm == "disk":
                        forget(stores[arm].adapter_path(name))
                    started = time.perf_counter()
                    size = load(stores[arm], name)
                    found[arm][when].append(1000 * (time.perf_counter() - started))
        for store in stores.values():
            store.close()
    result: dict[str, Any] = {"bytes": size}
    for arm, times in found.items():
        result[arm] = {when: _summary(some) for when, some in times.items()}
    return result


def _summary(some: list[float]) -> dict[str, float]:
    spread = {f"{name}_ms": round(value, 2) for name, value in percentiles(some, (90,)).items()}
    return {"median_ms": round(statistics.median(some), 2), **spread}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files go")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="f2l-bench-", dir=options.folder) as name:
        results = measure(Path(name), options.adapters, options.rounds)
    record.write(options.json, {"shape": SHAPE, "rank": RANK, **vars(options) | {"json": None}}, results)
    print(results)


if __name__ == "__main__":
    main()
