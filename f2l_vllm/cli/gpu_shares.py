"""How an engine and its hypernetwork workers share the GPUs of one machine, decided before either starts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from f2l_vllm.cli.gpus import Gpus
from f2l_vllm.engine.defaults import GPU_MEMORY

_LEAST = 0.1  # of a GPU, for a worker that was given no share: what long videos need has room on a large one
_UNKNOWN = 0.3  # the same where the driver does not tell the memory
_ENGINE_LEAST = 0.2  # below that there is hardly a GPU on which an engine starts
_ENGINE_BYTES = 1 << 30  # for an engine, beside its model: adapters, graphs, a small cache
_PASS_BYTES = 3 << 30  # half a GiB for CUDA itself (`pool/device.py`), the rest to compute (`hypernetwork/blocks.py`)


@dataclass(frozen=True)
class Shares:
    """What each part of a server gets.

    Attributes:
        worker: of a GPU, for each worker; 0: it computes on the CPU.
        engine: `--gpu-memory-utilization`; None: what the operator gave, or vLLM's default.
        devices: `CUDA_VISIBLE_DEVICES` of the workers; None: the server's.
    """

    worker: float = 0.0
    engine: float | None = None
    devices: str | None = None


def divide(
    found: Gpus,
    *,
    workers: int,
    need: int,
    asked: float | None,
    engine_gpus: int,
    engine_need: int = 0,
    utilization: float | None = None,
    part: float = 1.0,
) -> Shares:
    """The shares of the GPUs that are found.

    Workers get the GPUs that the engine leaves. If it leaves none, they share with it: what all workers of a server
    take, as if they were on one GPU, and what the engine takes are at most `GPU_MEMORY`, or all of it if the operator
    says so. vLLM wants its engine's part of the memory free when it starts, even if `--kv-cache-memory-bytes` bounds
    the cache (`v1/worker/utils.py`, `request_memory`), so it is always told one that is.

    Args:
        need: what a worker takes, `worker_bytes`.
        asked: `--worker-gpus`; None: not given.
        engine_gpus: how many GPUs the engine takes; 0: there is no engine here.
        engine_need: what the engine takes at least, on all its GPUs together: `engine_bytes`.
        utilization: `--gpu-memory-utilization`; None: not given.
        part: of the GPUs, for this server; others have the rest.

    Raises:
        ValueError: the GPUs have no room for this; the message says what to change.
    """
    together = GPU_MEMORY * part
    if not (workers and found.count) or asked == 0:
        is_alone = part == 1 or not (found.count and engine_gpus) or utilization is not None
        return Shares(asked or 0.0, None if is_alone else _down(together))
    least = need / found.bytes if found.bytes else 0.0
    engine_least = max(_ENGINE_LEAST, engine_need / (found.bytes * max(1, engine_gpus)) if found.bytes else 0.0)
    free = found.ids[engine_gpus:]
    if free:
        worker = asked or _down(part / math.ceil(workers / len(free)))
        if asked is None and worker < least:
            raise ValueError(_too_many(workers, need, found, "a share of the GPUs that the engine leaves"))
        engine = None if part == 1 or not engine_gpus or utilization is not None else _down(together)
        return Shares(worker, engine, ",".join(free) if engine_gpus else None)
    if asked is not None and utilization is not None:
        if workers * asked + utilization > 1 + 1e-9:
            raise ValueError(
                f"--gpu-memory-utilization {utilization:g} and {workers} x --worker-gpus {asked:g} are more than the "
                "GPU that they share: lower one of them"
            )
        return Shares(asked)
    if asked is not None:
        engine = _down(together - workers * asked)
        if engine < engine_least:
            raise ValueError(
                f"{workers} x --worker-gpus {asked:g} leaves the engine no room on the GPU that they share: lower "
                "--worker-gpus or --hypernetwork-workers"
            )
        return Shares(asked, engine)
    fair = _down((together - engine_least) / workers)
    usual = max(_up(least), min(_LEAST if found.bytes else _UNKNOWN, fair))
    if utilization is not None:
        usual = min(usual, _down((1 - utilization) / workers))
        if usual < max(least, 0.01):
            raise ValueError(_too_many(workers, need, found, f"what --gpu-memory-utilization {utilization:g} leaves"))
        return Shares(usual)
    engine = _down(together - workers * usual)
    if engine < engine_least:
        raise ValueError(_too_many(workers, need, found, "what the engine leaves"))
    return Shares(usual, engine)


def worker_bytes(model: Path, hypernetwork: Path) -> int:
    """What a worker takes of a GPU: the model in bf16, the hypernetwork in fp32, and room to compute."""
    own = hypernetwork / "model.safetensors" if hypernetwork.is_dir() else hypernetwork
    return _model_bytes(model) + 4 * _numbers(own) + _PASS_BYTES


def engine_bytes(model: Path) -> int:
    """What an engine takes of a GPU at least: the model in bf16, and what is beside it."""
    return _model_bytes(model) + _ENGINE_BYTES


def _model_bytes(model: Path) -> int:
    return 2 * sum(_numbers(path) for path in model.iterdir() if path.suffix in (".safetensors", ".bin"))


def _numbers(path: Path) -> int:
    """How many numbers a file of weights holds, by its header; another format is taken for fp32."""
    if path.suffix != ".safetensors":
        return path.stat().st_size // 4
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _too_many(workers: int, need: int, found: Gpus, where: str) -> str:
    return (
        f"--hypernetwork-workers {workers}: each needs {need / 2**30:.1f} GiB of a GPU, and {where} is too little "
        f"(a GPU has {found.bytes / 2**30:.0f} GiB); lower that number or --gpu-memory-utilization, or give "
        "--worker-gpus 0, and they compute on the CPU"
    )


def _down(share: float) -> float:
    return math.floor(share * 100 + 1e-6) / 100


def _up(share: float) -> float:
    return math.ceil(share * 100 - 1e-6) / 100
