"""Plain PyTorch replacements of the compiled operators that vLLM's CPU worker, sampler and block table call by name.

B requests, V vocabulary, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

PAD_SLOT = -1  # vLLM's mark for a token that has no place in the KV cache
_keep_alive: list[torch.library.Library] = []  # a Library drops its operators when it is collected


def install() -> None:
    """Register the operators of this module under `torch.ops._C`, except those already there. Idempotent."""
    if _keep_alive:
        return
    library = torch.library.Library("_C", "FRAGMENT")
    for schema, function in _OPERATORS.items():
        name = schema.partition("(")[0]
        if not hasattr(torch.ops._C, name):
            library.define(schema)
            library.impl(name, function, "CompositeExplicitAutograd")
    _keep_alive.append(library)


def init_cpu_memory_env(nodes: Sequence[int]) -> None:
    """Do nothing: the compiled operator binds memory to NUMA nodes; the operating system places it well enough."""


def greedy_argmax(logits_BV: torch.Tensor) -> torch.Tensor:
    """Most likely token of each row, `[B]` int64."""
    return logits_BV.argmax(dim=-1)


def fused_gumbel_argmax(logits_BV: torch.Tensor, seeds_B: torch.Tensor) -> torch.Tensor:
    """Sample one token per row by the Gumbel-max trick, `[B]` int64; a row's draw depends on its own seed only."""
    noise_BV = torch.empty_like(logits_BV)
    for row, seed in zip(noise_BV, seeds_B.tolist(), strict=True):
        row.exponential_(generator=torch.Generator().manual_seed(seed))
    return (logits_BV - noise_BV.log_()).argmax(dim=-1)


def compute_slot_mapping(
    query_start_loc: torch.Tensor,
    positions_T: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
) -> None:
    """Write into `slot_mapping` the KV-cache slot of every scheduled token; the rest becomes `PAD_SLOT`.

    Args:
        query_start_loc: `[B + 1]`, first token of each request in the batch, then the number of tokens.
        positions_T: position of each token in its request.
        block_table: `[>= B, blocks]`, physical block of each logical block of a request.
        slot_mapping: int64, `[>= T]`, written in place.
        block_size: tokens per block.
    """
    # numpy handles a few numbers in a fraction of the time that PyTorch needs to distribute them among threads.
    bounds, table = query_start_loc.numpy(), block_table.numpy()
    num_tokens = int(bounds[-1])
    request_T = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    position_T = positions_T[:num_tokens].numpy()
    slots = slot_mapping.numpy()
    slots[:num_tokens] = table[request_T, position_T // block_size].astype(np.int64) * block_size
    slots[:num_tokens] += position_T % block_size
    slots[num_tokens:] = PAD_SLOT


class SlotMappingOverride:
    """`compute_slot_mapping` with the launch arguments of vLLM's Triton kernel, bound by name.

    Raises:
        RuntimeError: the kernel lacks an argument that is needed here, so this version of vLLM is not supported.
    """

    _NEEDED = ("query_start_loc_ptr", "positions_ptr", "block_table_ptr", "slot_mapping_ptr", "KV_CACHE_BLOCK_SIZE")

    def __init__(self, kernel: Callable[..., Any]) -> None:
        names = getattr(kernel, "arg_names", None) or tuple(inspect.signature(kernel).parameters)
        if missing := [name for name in self._NEEDED if name not in names]:
            raise RuntimeError(
                f"vLLM's slot-mapping kernel has no argument {', '.join(missing)} (it has {', '.join(names)}): "
                "install the vLLM version that f2l-vllm asks for."
            )
        # vLLM's dispatcher passes arguments by name only to a callable with the kernel's parameters.
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )

    def __call__(self, **arguments: Any) -> None:
        assert arguments.get("TOTAL_CP_WORLD_SIZE", 1) == 1, "context parallelism does not exist on this platform"
        compute_slot_mapping(*(arguments[name] for name in self._NEEDED))


_OPERATORS: dict[str, Callable[..., Any]] = {
    "init_cpu_memory_env(int[] nodes) -> ()": init_cpu_memory_env,
    "greedy_argmax(Tensor logits) -> Tensor": greedy_argmax,
    "fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor": fused_gumbel_argmax,
    "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
    "Tensor(a!) slot_mapping, SymInt block_size) -> ()": compute_slot_mapping,
}
