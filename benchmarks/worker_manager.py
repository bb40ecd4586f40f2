"""`python -m benchmarks.worker_manager`: what holding adapters costs a vLLM worker, against vLLM's own manager.

One engine of the default model, in this process. Both managers drive the same model manager, so both see the same
slots and the same registry, and take turns within one process; ratios are those of the medians. Times are the CPU time
of this process, into which nothing else that runs on the machine enters.

A step: `set_active_adapters` of a decode batch whose adapters all have their slots, as nearly every step is.
A load: `_load_adapter`, then a copy of every factor, as for a slot; files in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from f2l_vllm import torch_shims

torch_shims.install()

import torch  # noqa: E402

from f2l_vllm import models  # noqa: E402
from f2l_vllm.bench import record  # noqa: E402
from f2l_vllm.bench.hypernetwork_shapes import SHAPES  # noqa: E402
from f2l_vllm.hypernetwork.adapter import Adapter  # noqa: E402
from f2l_vllm.hypernetwork.config import HypernetworkConfig  # noqa: E402
from f2l_vllm.hypernetwork.config_file import read_config  # noqa: E402

MODEL = "f2l-tiny"
SLOTS = 32
REGISTERED = (64, 256, 1024, 4096)
ACTIVE = (1, 8, SLOTS)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200, help="steps timed per manager and size")
    parser.add_argument("--loads", type=int, default=100, help="loads timed per manager and adapter")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tiny = read_config(models.resolve_hypernetwork(MODEL, None))
    shapes = {f"{MODEL}, rank {2 * tiny.rank}": (tiny, 2 * tiny.rank)}
    shapes["SmolVLM2-500M, rank 64"] = (SHAPES["500M"].hypernetwork, 64)
    with tempfile.TemporaryDirectory(prefix="f2l-bench-") as folder:
        paths = {}
        for number, (name, (config, rank)) in enumerate(shapes.items()):
            paths[name] = Path(folder) / str(number)
            random_adapter(config, rank).save(paths[name], "base")
        small = next(iter(paths))
        stock, ours = managers(max_rank=64)
        steps = {
            f"{registered} registered": {
                f"{active} in the batch": step(stock, ours, paths[small], registered, active, options.steps)
                for active in ACTIVE
            }
            for registered in REGISTERED
        }
        loads = {
            f"{name}, engine in {dtype}": load(stock, ours, path, DTYPES[dtype], options.loads)
            for name, path in paths.items()
            for dtype in DTYPES
        }
    configuration = {
        "model": MODEL,
        "slots": SLOTS,
        "steps": options.steps,
        "loads": options.loads,
        "threads": options.threads,
    }
    record.write(options.json, configuration, {"step": steps, "load": loads})


def managers(max_rank: int) -> tuple[Any, Any]:
    """vLLM's manager and ours over one engine's model."""
    from vllm import LLM
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    llm = LLM(
        str(models.resolve(MODEL)),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=SLOTS,
        kv_cache_memory_bytes=32 << 20,
        enable_lora=True,
        max_loras=SLOTS,
        max_cpu_loras=max(REGISTERED),
        max_lora_rank=max_rank,
        lora_target_modules=["down_proj"],
    )
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.model_runner
    ours = runner.lora_manager
    stock = LRUCacheWorkerLoRAManager(core.vllm_config, runner.device, ours.embedding_modules)
    stock._adapter_manager = ours._adapter_manager
    assert type(ours) is not type(stock)
    return stock, ours


def random_adapter(config: HypernetworkConfig, rank: int) -> Adapter:
    """Factors of the shapes this hypernetwork writes."""
    layers = config.num_layers
    factors = {
        name: (torch.randn(layers, rank, d_in) / d_in**0.5, torch.randn(layers, rank, d_out) / rank**0.5)
        for name, (d_in, d_out) in config.modules.items()
    }
    return Adapter(factors, 1.0)


def step(stock: Any, ours: Any, path: Path, registered: int, active: int, steps: int) -> dict[str, Any]:
    """CPU time of `set_active_adapters` with so many adapters registered and so many in the batch."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest

    requests = {LoRARequest(f"adapter-{number}", number, str(path)) for number in range(1, registered + 1)}
    manager = ours._adapter_manager
    manager.remove_all_adapters()
    first = ours._load_adapter(LoRARequest("adapter-1", 1, str(path)))
    for number in range(1, registered + 1):
        manager.add_adapter(first.clone(number))
    batch = {request for request in requests if request.lora_int_id <= active}
    rows = tuple(1 + row % active for row in range(SLOTS))
    mapping = LoRAMapping(rows, rows, is_prefill=True)
    ours.set_active_adapters(batch, mapping)
    row = alternate(
        lambda: stock.set_active_adapters(batch, mapping), lambda: ours.set_active_adapters(batch, mapping), steps
    )
    assert len(manager) == registered
    return row


def load(stock: Any, ours: Any, path: Path, dtype: torch.dtype, loads: int) -> dict[str, Any]:
    """CPU time to load one adapter and copy its factors, in an engine that computes adapters in `dtype`."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter-1", 1, str(path))
    before = ours.lora_config.lora_dtype
    ours.lora_config.lora_dtype = dtype
    slot = {
        name: (torch.empty_like(lora.lora_a), torch.empty_like(lora.lora_b))
        for name, lora in ours._load_adapter(request).loras.items()
    }

    def one(manager: Any) -> None:
        for name, lora in manager._load_adapter(request).loras.items():
            slot[name][0].copy_(lora.lora_a)
            slot[name][1].copy_(lora.lora_b)

    try:
        row = alternate(lambda: one(stock), lambda: one(ours), loads)
    finally:
        ours.lora_config.lora_dtype = before
    return {"file_mb": round((path / "adapter_model.safetensors").stat().st_size / 1e6, 3), **row}


def alternate(stock: Callable[[], None], ours: Callable[[], None], times: int) -> dict[str, Any]:
    """CPU milliseconds of both, in turns, each as often first as second."""
    arms = {"stock": stock, "ours": ours}
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(times + 2):
        for name in (*arms,) if turn % 2 else (*arms,)[::-1]:
            started = time.process_time()
            arms[name]()
            if turn > 1:  # the first of each order pay for what is cached
                taken[name].append((time.process_time() - started) * 1e3)
    row: dict[str, Any] = {}
    for name, values in taken.items():
        quartiles = statistics.quantiles(values, n=4)
        row[f"{name}_ms"] = {
            "median": round(quartiles[1], 5),
            "quartiles": [round(quartiles[0], 5), round(quartiles[2], 5)],
        }
    row["ours_over_stock"] = round(row["ours_ms"]["median"] / row["stock_ms"]["median"], 6)
    return row


if __name__ == "__main__":
    main()
