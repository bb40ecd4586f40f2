"""What `f2l-vllm serve` asks of vLLM's engine where the operator says nothing, and why.

Sources are files of vLLM 0.32, or measurements of this project; `docs/operations.md` has the same as a table. Nobody
here has run them on a GPU: what is said about one is read from vLLM's kernels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from f2l_vllm.hypernetwork.ranks import advice

SEQUENCES = 32
"""Requests in a step, and slots for adapters.

As many slots as requests: the scheduler passes over a request whose adapter would be one more than the slots
(`v1/core/sched/scheduler.py`), so with fewer a video asked rarely waits behind those asked often.

No more than 32, for slots are memory, used or not (at rank 64, 14.4 MB each for the 500M shape and 31.5 MB for 2.2B),
and on a GPU every LoRA kernel of a step is launched for all of them (`lora/ops/triton_ops/lora_shrink_op.py`: the grid
has `max_loras + 1` layers, of which those without rows end at once). 64 is sane there, too; 256 slots make 2 million
blocks a layer of a prompt of 8,192 tokens."""

HOST_ADAPTERS = 256
"""Adapters kept in host memory, of which a step takes those it needs: 1.8 GB at rank 32 for the 500M shape in bf16. An
adapter that is not there is read from its file before its question is scheduled, which costs about a millisecond."""

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open. vLLM closes it after 5 (`envs.py`), when `openai` and any client on httpx
stops using it too (`httpx/_config.py`, `keepalive_expiry`): a question sent at that moment finds it closed. Of 32
connections idle for 4.97 s, 42 of 800 questions met "Connection error" with `max_retries=0`; with this value none."""


@dataclass(frozen=True)
class EngineLimits:
    """What the engine is started with. `host_slots`: adapters kept in host memory; no `target_modules`: all."""

    max_rank: int
    host_slots: int
    target_modules: frozenset[str] | None


def check_limits(limits: EngineLimits, *, rank: int, modules: Collection[str]) -> None:
    """Refuse an engine that would not attach a video's adapter: it would answer from the base model, and say nothing.

    Raises:
        ValueError: the engine's rank is below `rank`, or it does not wrap one of `modules`; the message says the flag.
    """
    if rank > limits.max_rank:
        raise ValueError(f"adapters have rank {rank}, the engine has room for {limits.max_rank}: {advice(rank)}")
    missing = sorted(set(modules) - limits.target_modules) if limits.target_modules is not None else []
    if missing:
        raise ValueError(
            f"adapters change {', '.join(missing)}: name it in --lora-target-modules, or leave that flag out"
        )


def refuse_flags(args: Any) -> None:
    """Refuse flags of vLLM's under which videos would not be served, or not as their adapters say.

    Args:
        args: vLLM's arguments, all or those given.

    Raises:
        ValueError: one of them; the message says which and why.
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
        rank: what `smallest_rank` gave.
        modules: linear layers that adapters change.
        is_small: whether the model is one that this package ships.
        slots, places: what the operator gave of `--max-loras` and `--max-cpu-loras`; the other fits it, as vLLM wants
            no fewer places than slots.
    """
    slots = slots or min(SEQUENCES, places or HOST_ADAPTERS)
    flags = {
        "--enable-lora": [],
        "--max-lora-rank": [str(rank)],
        # Without it every linear layer of the text model gets slots and LoRA kernels: five times the memory, and on a
        # CPU 5.9 tokens a second where down_proj alone leaves 8.2 of 8.7.
        "--lora-target-modules": sorted(modules),
        "--max-loras": [str(slots)],
        "--max-cpu-loras": [str(max(HOST_ADAPTERS, slots))],
        "--max-num-seqs": [str(SEQUENCES)],
    }
    if is_small and not has_gpu:
        # Small enough that fp32 costs nothing, and processors without fast bf16 are spared its emulation.
        flags["--dtype"] = ["float32"]
    return flags


# Left at vLLM's default, which is off, and refused by `refuse_flags`:
# --specialize-active-lora launches LoRA kernels for as many adapters as a step has, rounded up to what CUDA graphs were
# captured for (`lora/ops/triton_ops/lora_kernel_metadata.py`). Nobody here has seen on a GPU that a batch of requests
# with and without adapters keeps every adapter under it; where one is lost, the base model answers in its place.
