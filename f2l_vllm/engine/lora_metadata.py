"""What vLLM's LoRA kernels must know of a step, which adapter each token has, prepared without waiting for the GPU.

vLLM walks through the tokens in Python, and sorts and counts them on the GPU, whose results it waits for four times at
every change of the batch (`PunicaWrapperGPU.update_metadata`). Here numpy does both, and one copy from pinned memory
brings all of it. vLLM's own tensors are filled, so CUDA graphs and compiled code find them where they were.

`tests/unit/engine/test_lora_metadata.py` compares with vLLM, tensor for tensor.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_Filled = list[tuple[torch.Tensor, np.ndarray]]  # a tensor of vLLM's, and what its first elements become


def install() -> None:
    """Have vLLM's wrapper of the GPU kernels prepare its metadata here. Idempotent."""
    from vllm.lora.punica_wrapper import punica_gpu

    wrapper: Any = punica_gpu.PunicaWrapperGPU
    wrapper.update_metadata = update_metadata


def update_metadata(
    self: Any, mapping: Any, lora_index_to_id: Sequence[int | None], max_loras: int, vocab_size: int, **_: Any
) -> None:
    """As `PunicaWrapperGPU.update_metadata`.

    Args:
        mapping: a `LoRAMapping`: the adapter's id of every token and of every request, 0 for none.
        lora_index_to_id: the id in each slot.

    Raises:
        KeyError: an adapter is in no slot.
    """
    self.is_prefill = mapping.is_prefill
    slots = {0: -1} | {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
    tokens, requests = (
        np.fromiter(map(slots.__getitem__, ids), np.int64, len(ids))
        for ids in (mapping.index_mapping, mapping.prompt_mapping)
    )
    count = len(requests)
    padded = np.arange(count) + np.where(requests == -1, max_loras - 1, requests) * count
    filled: _Filled = [
        (self._token_lora_indices, tokens),
        (self._sampler_indices, requests),
        (self._sampler_indices_padded, padded),
        (self._embeddings_indices, np.maximum(tokens, 0) * vocab_size),
    ]
    self.indices_len[:] = [len(values) for _, values in filled]
    filled += _kernel_metadata(self.token_mapping_meta, tokens) + _kernel_metadata(self.prompt_mapping_meta, requests)
    _copy(filled, torch.device(self.device))


def _kernel_metadata(meta: Any, slots: np.ndarray) -> _Filled:
    """As `LoRAKernelMeta.prepare_tensors`: sets what is on the host, and returns what goes to the device."""
    each = np.bincount(slots + 1)  # of no slot first
    nothing = len(each) <= 1
    ids = np.flatnonzero(each)[: 0 if nothing else None] - 1
    counts = each[ids + 1]
    active = len(ids)
    if active and meta.captured_lora_counts:
        place = bisect.bisect_left(meta.captured_lora_counts, active)
        active = meta.captured_lora_counts[place] if place < len(meta.captured_lora_counts) else active
    meta.no_lora_flag_cpu[0] = nothing
    meta.num_active_loras_cpu[0] = active

    filled = [
        (meta.active_lora_ids, np.full(len(meta.active_lora_ids), -1)),
        (meta.num_tokens_per_lora, np.zeros(len(meta.num_tokens_per_lora), np.int64)),
        (meta.lora_token_start_loc, np.zeros(len(meta.lora_token_start_loc), np.int64)),
    ]
    for (_, values), found in zip(filled, (ids, counts), strict=False):
        values[: len(found)] = found
    filled[2][1][1 : len(counts) + 1] = counts.cumsum()
    if not nothing:
        by_slot = np.argsort(slots, kind="stable")
        filled += [(meta.token_lora_mapping, slots), (meta.token_indices_sorted_by_lora_ids, by_slot)]
    return filled


def _copy(filled: _Filled, device: torch.device) -> None:
    """One copy to the device, and there one into the tensors of each type."""
    groups = [[(to, values) for to, values in filled if to.dtype == dtype] for dtype in (torch.int64, torch.int32)]
    sizes = [sum(len(values) for _, values in group) for group in groups]
    wide = 8 * sizes[0]
    host = torch.empty(wide + 4 * sizes[1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for group, part in zip(groups, (host[:wide].view(torch.int64), host[wide:].view(torch.int32)), strict=True):
        np.concatenate([values for _, values in group], out=part.numpy(), casting="same_kind")
    sent = host.to(device, non_blocking=True)
    for group, part in zip(groups, (sent[:wide].view(torch.int64), sent[wide:].view(torch.int32)), strict=True):
        lengths = [len(values) for _, values in group]
        targets = [to[:length] for (to, _), length in zip(group, lengths, strict=True)]
        torch._foreach_copy_(targets, list(part.split(lengths)))
