"""Many LoRA adapters in one batch: a pair of matrix products for each adapter that the batch holds.

vLLM's own CPU wrapper copies an adapter's weights for every token, and gives rows without an adapter (slot -1) the
weights of the last slot. Here rows are grouped by slot, weights are read in place, and slot -1 is in no group.

T rows, I input features, O output features, R rank, M slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping

Rows = slice | torch.Tensor
Groups = list[tuple[int, Rows]]


def group_rows(slots_T: torch.Tensor) -> Groups:
    """`[(slot, its rows)]` of every slot in `slots_T` but -1; rows are a slice where they follow each other."""
    ids, lengths = torch.unique_consecutive(slots_T, return_counts=True)
    runs: dict[int, list[slice]] = {}
    start = 0
    for slot, length in zip(ids.tolist(), lengths.tolist(), strict=True):
        if slot >= 0:
            runs.setdefault(slot, []).append(slice(start, start + length))
        start += length
    return [(slot, own[0] if len(own) == 1 else (slots_T == slot).nonzero()[:, 0]) for slot, own in runs.items()]


def add_low_rank(
    out_TO: torch.Tensor,
    x_TI: torch.Tensor,
    a_M1RI: torch.Tensor,
    b_M1OR: torch.Tensor,
    groups: Groups,
    scale: float = 1.0,
) -> None:
    """`out[rows] += scale * B[slot] (A[slot] x[rows])` for every group, in place.

    `out` may be wider than O: vLLM pads the logits.
    """
    out_TO = out_TO[:, : b_M1OR.shape[2]]
    for slot, rows in groups:
        hidden_TR = x_TI[rows].to(a_M1RI.dtype) @ a_M1RI[slot, 0].T
        _add(out_TO, rows, hidden_TR, b_M1OR[slot, 0], scale)


def _add(out_TO: torch.Tensor, rows: Rows, x_TR: torch.Tensor, weight_OR: torch.Tensor, scale: float = 1.0) -> None:
    delta_TO = (x_TR.to(weight_OR.dtype) @ weight_OR.T).to(out_TO.dtype)
    if isinstance(rows, slice):
        out_TO[rows].add_(delta_TO, alpha=scale)
    else:
        out_TO.index_add_(0, rows, delta_TO, alpha=scale)


class GroupedPunicaWrapper(PunicaWrapperBase):
    """vLLM's multi-LoRA operations by groups of rows. All of them add in place to their first argument."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._token_groups: Groups = []
        self._sampler_groups: Groups = []

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        # Not the inherited method, which also prepares what the kernels of a GPU read.
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self._token_groups = group_rows(self.token_lora_indices)
        self._sampler_groups = group_rows(self.sampler_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add each slice's adapter to its columns of `y` `[T, sum(output_slices)]`, for the input `x` `[T, I]`."""
        if not self._token_groups:
            return
        x_TI, y_TO = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        slices = y_TO[:, : sum(output_slices)].split(output_slices, dim=1)
        for out_TO, a_M1RI, b_M1OR in zip(slices, lora_a_stacked, lora_b_stacked, strict=True):
            add_low_rank(out_TO, x_TI, a_M1RI, b_M1OR, self._token_groups, scale)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapters of the LM head to the logits `y` `[requests, >= O]`."""
        y_TO, x_TI = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        add_low_rank(y_TO, x_TI, lora_a_stacked, lora_b_stacked, self._sampler_groups, scale)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Add `B[slot] x` to the embeddings `y` `[T, O]`; `x` `[T, R]` holds the rows of A, already looked up."""
        for slot, rows in self._token_groups:
            _add(y, rows, x[rows], lora_b_stacked[slot, 0])

    def add_shrink(
        self,
        y: Sequence[torch.Tensor] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """`y[i] += scale * A_i[slot] x`: the first half of a linear layer sharded over several workers."""
        x_TI = x.view(-1, x.shape[-1])
        for y_TR, a_M1RI in zip(y, lora_a_stacked, strict=True):
            for slot, rows in self._token_groups:
                _add(y_TR, rows, x_TI[rows], a_M1RI[slot, 0], scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Sequence[torch.Tensor] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y[:, slice i] += B_i[slot] x[i]`: the second half of a linear layer sharded over several workers."""
        y_TO = y.view(-1, y.shape[-1])
        end = offset_start + sum(output_slices)
        slices = y_TO[:, offset_start:end].split(output_slices, dim=1)
        for out_TO, x_TR, b_M1OR in zip(slices, x, lora_b_stacked, strict=True):
            for slot, rows in self._token_groups:
                _add(out_TO, rows, x_TR[rows], b_M1OR[slot, 0])

    def apply_lora_full_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        weight_stacked: torch.Tensor,
        bias_stacked: torch.Tensor,
        module_enabled: torch.Tensor,
    ) -> None:
        """Replace the rows of `y` whose adapter brings a whole classification head by that head's output."""
        own = torch.zeros(x.shape[0], weight_stacked.shape[-2], dtype=torch.float32)
        for slot, rows in self._sampler_groups:
            _add(own, rows, x[rows], weight_stacked[slot].flatten(0, -2))
        y.copy_(self._select_full_linear_output(y, own, bias_stacked, module_enabled))
