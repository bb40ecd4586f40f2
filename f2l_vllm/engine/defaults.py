"""The engine settings that `f2l-vllm serve` chooses where the operator gives none, and why.

Sources are files of vLLM 0.32, or measurements of this project; `docs/deploy.md` has the same as a table. Nobody
here has run these settings on a GPU: statements about GPUs come from reading vLLM's kernels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from f2l_vllm.hypernetwork.ranks import advice

GPU_MEMORY = 0.92
"""Of a GPU's memory, for all of a server: vLLM's own default for an engine (`config/cache.py`)."""

SEQUENCES = 32
"""Slots for adapters and, without a GPU, requests in a step.

As many slots as requests: the scheduler skips a request whose adapter finds no free slot
(`v1/core/sched/scheduler.py`), so with fewer slots a rarely asked video waits behind those asked often. A GPU, though,
needs more requests in a step than that to be busy, and vLLM captures CUDA graphs for batches up to a multiple of their
number (`config/vllm.py`): there vLLM's own number stays, which goes by the GPU, and questions about more than 32 videos
at a time wait for a slot.

No more than 32: a slot takes memory even when unused (at rank 64, 14.4 MB for the 500M shape and 31.5 MB for 2.2B), and
on a GPU every LoRA kernel of a step is launched for all slots (`lora/ops/triton_ops/lora_shrink_op.py`: the grid has
`max_loras + 1` layers, of which those without rows end at once). 64 is sane there, too; with 256 slots, a prompt of
8,192 tokens takes 2 million blocks per layer."""

HOST_ADAPTERS = 256
"""Adapters kept in host memory, from which a step takes those it needs: 1.8 GB at rank 32 for the 500M shape in bf16.
A missing adapter is read from its file before its question is scheduled, which costs about a millisecond."""

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open. vLLM's default is 5 (`envs.py`), and `openai` and any client on httpx stops
using a connection after the same time (`httpx/_config.py`, `keepalive_expiry`): a question sent at that moment finds it
closed. With 32 connections idle for 4.97 s, 42 of 800 questions failed with "Connection error" at `max_retries=0`; with
this value none."""


_ELSEWHERE = ("ray", "external_launcher")  # executors that may use other machines


@dataclass(frozen=True)
class EngineLimits:
    """The engine's limits. `host_slots`: adapters kept in host memory; `target_modules` None: all linear layers."""

    max_rank: int
    host_slots: int
    target_modules: frozenset[str] | None


def check_limits(limits: EngineLimits, *, rank: int, modules: Collection[str]) -> None:
    """Refuse an engine that would not attach a video's adapter: it would silently answer from the base model.

    Raises:
        ValueError: the engine's rank is below `rank`, or it does not wrap one of `modules`; the message names the flag.
    """
    if rank > limits.max_rank:
        raise ValueError(f"adapters have rank {rank}, the engine has room for {limits.max_rank}: {advice(rank)}")
    missing = sorted(set(modules) - limits.target_modules) if limits.target_modules is not None else []
    if missing:
        raise ValueError(
            f"adapters change {', '.join(missing)}: name it in --lora-target-modules, or leave that flag out"
        )


def refuse_flags(args: Any) -> None:
    """Refuse vLLM's flags under which videos would not be served, or not from their adapters.

    Args:
        args: vLLM's arguments, all or only the given ones.

    Raises:
        ValueError: one of these flags is set; the message says which and why.
    """
    if (getattr(args, "api_server_count", None) or 1) > 1:
        raise ValueError("--api-server-count must be 1: who uses an adapter is known to one API server only")
    if getattr(args, "specialize_active_lora", False):
        raise ValueError("--specialize-active-lora is not supported: mixed base and adapter batches may lose adapters")
    if not getattr(args, "enable_lora", True):
        raise ValueError("--no-enable-lora: videos are answered from LoRA adapters; leave the flag out")
    for name in ("headless", "grpc"):
        if getattr(args, name, False):
            raise ValueError(f"--{name}: videos are served over HTTP by this process; leave the flag out")


def is_on_one_machine(parallel: Any) -> bool:
    """Whether the engine's workers all run on the API server's machine, so that they find what it keeps in `/dev/shm`.

    Args:
        parallel: vLLM's arguments, all or only the given ones, or its `ParallelConfig`.
    """
    executor = getattr(parallel, "distributed_executor_backend", None)
    return getattr(parallel, "nnodes", 1) == 1 and executor not in _ELSEWHERE


def engine_flags(
    *,
    rank: int,
    modules: Collection[str],
    is_small: bool,
    has_gpu: bool,
    slots: int | None = None,
    places: int | None = None,
) -> dict[str, list[str]]:
    """Flags of `vllm serve` and their values.

    Args:
        rank: the result of `smallest_rank`.
        modules: linear layers that adapters change.
        is_small: whether this package ships the model.
        slots, places: the operator's `--max-loras` and `--max-cpu-loras`; if one is missing it is made to fit the
            other, because vLLM wants no fewer places than slots.
    """
    slots = slots or min(SEQUENCES, places or HOST_ADAPTERS)
    flags = {
        "--enable-lora": [],
        "--max-lora-rank": [str(rank)],
        # Without it every linear layer of the text model gets slots and LoRA kernels: five times the memory, and on a
        # CPU 5.9 tokens a second, compared with 8.2 for down_proj alone and 8.7 without LoRA.
        "--lora-target-modules": sorted(modules),
        "--max-loras": [str(slots)],
        "--max-cpu-loras": [str(max(HOST_ADAPTERS, slots))],
    }
    if not has_gpu:
        flags["--max-num-seqs"] = [str(SEQUENCES)]
    if is_small and not has_gpu:
        # The model is so small that fp32 costs nothing, and processors without fast bf16 need not emulate it.
        flags["--dtype"] = ["float32"]
    return flags


# Left at vLLM's default, which is off, and refused by `refuse_flags`:
# --specialize-active-lora launches LoRA kernels for the number of adapters in a step, rounded up to what CUDA graphs
# were captured for. That number counts adapters (`v1/worker/gpu/lora_utils.py`); the kernels' list of a step that also
# has base rows begins with "none" (`lora/ops/triton_ops/lora_kernel_metadata.py`), so the last adapter gets no layer of
# blocks and its rows are answered by the base model. `unit/engine/test_v2_runner.py` shows it.
