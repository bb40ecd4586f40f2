"""Many LoRA adapters in one batch.

vLLM's own CPU wrapper copies an adapter's weights for every token, and gives rows without an adapter (slot -1) the
weights of the last slot. Here weights are read in place, and slot -1 is left alone.

Rows of a linear layer are computed in one of two ways. Consecutive rows that share an adapter, as in a prompt, take two
matrix products. All other rows, as in a step that decodes many sequences with an adapter each, take two calls together:
each row's output is a sum of rows of its own slot's tables (see `lora_slots`), weighted by the row's input, which is
what `embedding_bag` computes. It reads the weights once, from any slots, and reads no padding of ranks.

T rows, N rows of a bag, I input features, O output features, R largest rank, w width of a slot's rows, M slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from f2l_vllm.cpu.lora_slots import is_table

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping

Rows = slice | torch.Tensor
Groups = list[tuple[int, Rows]]

MIN_ROWS_OF_A_PRODUCT = 16
"""For this many consecutive rows or more, two matrix products take less time than sums of the tables' rows."""


@dataclass(frozen=True)
class Run:
    """Consecutive rows that share an adapter."""

    slot: int
    width: int
    rows: slice


@dataclass(frozen=True)
class Bag:
    """Rows with adapters of one width, computed together."""

    width: int
    rows: Rows
    slots_N: torch.Tensor
    _tables: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def table_rows(self, count: int, slot_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The table rows that each of the N rows sums, `[N * count]`, and where each row's part begins, `[N]`.

        Args:
            count: how many of the slot's rows, from its first, are summed.
            slot_size: rows from one slot to the next.
        """
        key = (count, slot_size)
        if key not in self._tables:  # the same for every layer of the step
            # int32 halves the indices: each is read together with a row of only some 64 bytes.
            rows_NC = self.slots_N.int()[:, None] * slot_size + torch.arange(count, dtype=torch.int32)
            self._tables[key] = (rows_NC.view(-1), torch.arange(0, rows_NC.numel(), count, dtype=torch.int32))
        return self._tables[key]


@dataclass(frozen=True)
class Plan:
    """How the rows of a step are computed; rows without an adapter are in none of its parts."""

    runs: list[Run]
    bags: list[Bag]


def plan(slots_T: torch.Tensor, widths: dict[int, int], max_rank: int) -> Plan:
    """Divide the rows of a step; each has a slot or -1, and slots absent from `widths` are `max_rank` wide."""
    ids, lengths = torch.unique_consecutive(slots_T, return_counts=True)
    runs: list[Run] = []
    few: dict[int, list[slice]] = {}
    start = 0
    for slot, length in zip(ids.tolist(), lengths.tolist(), strict=True):
        rows = slice(start, start + length)
        start += length
        if slot < 0:
            continue
        width = widths.get(slot, max_rank)
        if length >= MIN_ROWS_OF_A_PRODUCT:
            runs.append(Run(slot, width, rows))
        else:
            few.setdefault(width, []).append(rows)
    bags = []
    for width, parts in few.items():
        rows_N: Rows = slice(parts[0].start, parts[-1].stop)
        if sum(part.stop - part.start for part in parts) < rows_N.stop - rows_N.start:
            rows_N = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        bags.append(Bag(width, rows_N, slots_T[rows_N]))
    return Plan(runs, bags)


def add_low_rank(
    out_TO: torch.Tensor, x_TI: torch.Tensor, a_M1RI: torch.Tensor, b_M1OR: torch.Tensor, plan: Plan, scale: float
) -> None:
    """`out[row] += scale * B[slot] (A[slot] x[row])` for every row of the plan, in place. Slots must be tables."""
    max_rank, inputs = a_M1RI.shape[2:]
    outputs = b_M1OR.shape[2]
    a_flat, b_rows = a_M1RI.transpose(2, 3).view(-1), b_M1OR.transpose(2, 3).view(-1, outputs)
    for run in plan.runs:
        start = run.slot * max_rank
        a_IW = a_flat[start * inputs :][: inputs * run.width].view(inputs, run.width)
        b_WO = b_rows[start : start + run.width]
        hidden_TW = x_TI[run.rows].to(a_IW.dtype) @ a_IW
        if out_TO.dtype is b_WO.dtype:
            out_TO[run.rows].addmm_(hidden_TW, b_WO, alpha=scale)
        else:
            out_TO[run.rows].add_(hidden_TW @ b_WO, alpha=scale)
    for bag in plan.bags:
        x_NI = x_TI[bag.rows].to(a_flat.dtype).reshape(-1)
        hidden_NW = _bag(a_flat.view(-1, bag.width), bag.table_rows(inputs, inputs * max_rank // bag.width), x_NI)
        delta_NO = _bag(b_rows, bag.table_rows(bag.width, max_rank), hidden_NW.view(-1)).to(out_TO.dtype)
        if isinstance(bag.rows, slice):
            out_TO[bag.rows].add_(delta_NO, alpha=scale)
        else:
            out_TO.index_add_(0, bag.rows, delta_NO, alpha=scale)


def _bag(table: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    return F.embedding_bag(rows[0], table, rows[1], mode="sum", per_sample_weights=weights)


def group_rows(slots_T: torch.Tensor) -> Groups:
    """`[(slot, its rows)]` of every slot in `slots_T` except -1; consecutive rows are a slice."""
    ids, lengths = torch.unique_consecutive(slots_T, return_counts=True)
    runs: dict[int, list[slice]] = {}
    start = 0
    for slot, length in zip(ids.tolist(), lengths.tolist(), strict=True):
        if slot >= 0:
            runs.setdefault(slot, []).append(slice(start, start + length))
        start += length
    return [(slot, own[0] if len(own) == 1 else (slots_T == slot).nonzero()[:, 0]) for slot, own in runs.items()]


def _add(out_TO: torch.Tensor, rows: Rows, x_TR: torch.Tensor, weight_OR: torch.Tensor, scale: float = 1.0) -> None:
    delta_TO = (x_TR.to(weight_OR.dtype) @ weight_OR.T).to(out_TO.dtype)
    if isinstance(rows, slice):
        out_TO[rows].add_(delta_TO, alpha=scale)
    else:
        out_TO.index_add_(0, rows, delta_TO, alpha=scale)


class GroupedPunicaWrapper(PunicaWrapperBase):
    """vLLM's multi-LoRA operations. All of them add in place to their first argument."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._widths: dict[int, int] = {}
        self._forget_rows()

    def set_width(self, slot: int, width: int) -> None:
        """Set the width of the rows of a slot of A; without it, they are as wide as the largest rank."""
        self._widths[slot] = width
        self._forget_rows()

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        # Not the inherited method, which also prepares data for GPU kernels.
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._plan: Plan | None = None
        self._token_groups_now: Groups | None = None
        self._sampler_groups_now: Groups | None = None

    @property
    def _token_groups(self) -> Groups:
        if self._token_groups_now is None:
            self._token_groups_now = group_rows(self.token_lora_indices)
        return self._token_groups_now

    @property
    def _sampler_groups(self) -> Groups:
        if self._sampler_groups_now is None:
            self._sampler_groups_now = group_rows(self.sampler_indices)
        return self._sampler_groups_now

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
        x_TI, y_TO = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        slices = [y_TO] if len(output_slices) == 1 else y_TO[:, : sum(output_slices)].split(output_slices, dim=1)
        for out_TO, a_M1RI, b_M1OR in zip(slices, lora_a_stacked, lora_b_stacked, strict=True):
            if is_table(a_M1RI):
                if self._plan is None:
                    self._plan = plan(self.token_lora_indices, self._widths, a_M1RI.shape[2])
                add_low_rank(out_TO, x_TI, a_M1RI, b_M1OR, self._plan, scale)
            else:
                self._add_by_slot(out_TO, x_TI, a_M1RI, b_M1OR, self._token_groups, scale)

    @staticmethod
    def _add_by_slot(
        out_TO: torch.Tensor,
        x_TI: torch.Tensor,
        a_M1RI: torch.Tensor,
        b_M1OR: torch.Tensor,
        groups: Groups,
        scale: float,
    ) -> None:
        """As `add_low_rank`, from slots in vLLM's own layout."""
        for slot, rows in groups:
            _add(out_TO, rows, x_TI[rows].to(a_M1RI.dtype) @ a_M1RI[slot, 0].T, b_M1OR[slot, 0], scale)

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
        out_TO = y_TO[:, : lora_b_stacked.shape[2]]  # vLLM pads the logits
        self._add_by_slot(out_TO, x_TI, lora_a_stacked, lora_b_stacked, self._sampler_groups, scale)

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
        """Replace the rows of `y` whose adapter has a whole classification head by that head's output."""
        own = torch.zeros(x.shape[0], weight_stacked.shape[-2], dtype=torch.float32)
        for slot, rows in self._sampler_groups:
            _add(own, rows, x[rows], weight_stacked[slot].flatten(0, -2))
        y.copy_(self._select_full_linear_output(y, own, bias_stacked, module_enabled))
