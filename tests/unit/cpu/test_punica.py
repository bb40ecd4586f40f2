"""Multi-LoRA against the definition, applied row by row."""

from __future__ import annotations

import pytest
import torch
from vllm.lora.layers import LoRAMapping

from f2l_vllm.cpu.lora_slots import pack_slot, row_width, transposed_slots
from f2l_vllm.cpu.punica import MIN_ROWS_OF_A_PRODUCT, GroupedPunicaWrapper, group_rows, plan

SLOTS, RANK, INPUT = 3, 4, 10
MANY = MIN_ROWS_OF_A_PRODUCT
BATCHES = {
    "base only": [-1, -1, -1],
    "one adapter": [1, 1, 1],
    "base among adapters": [0, 0, -1, 2, 2, -1, 1],
    "repeated slots": [0, 1, 0, -1, 1, 0, 2],
    "decode of many": [2, 1, 0, -1],
    "prompts": [1] * MANY + [-1] * 3 + [0] * (2 * MANY),
    "prompts and decode": [0] * MANY + [1, 2, -1, 0] + [2] * MANY + [1] * (MANY - 1),
    "base before and after": [-1, 0, 1, 2, -1],
}
RANKS = [3, 4, 1]
"""Rank of the adapter in each slot, for slots that hold it packed: width 4, 4 and 1."""


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make_wrapper(slots: list[int]) -> GroupedPunicaWrapper:
    wrapper = GroupedPunicaWrapper(128, 128, torch.device("cpu"))
    ids = [slot + 10 if slot >= 0 else 0 for slot in slots]
    mapping = LoRAMapping(index_mapping=tuple(ids), prompt_mapping=tuple(ids), is_prefill=True)
    wrapper.update_metadata(mapping, [10, 11, 12], SLOTS, 100)
    return wrapper


def weights(widths: list[int], generator: torch.Generator) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUT, generator=generator) for _ in widths)
    b = tuple(torch.randn(SLOTS, 1, width, RANK, generator=generator) for width in widths)
    return a, b


def by_rows(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: list[int], scale: float = 1.0
) -> torch.Tensor:
    expected = y.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[row] += scale * (b[slot, 0] @ (a[slot, 0] @ x[row]))
    return expected


def as_tables(
    a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], ranks: list[int], wrapper: GroupedPunicaWrapper
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The same factors as `CompactLoRAModelManager` holds them, those beyond `ranks` never to be read."""
    stacked = tuple(tuple(transposed_slots(t).copy_(t) for t in factors) for factors in (a, b))
    for slot, rank in enumerate(ranks):
        width = row_width(rank, RANK)
        wrapper.set_width(slot, width)
        for a_table, b_table in zip(*stacked, strict=True):
            a_table[slot, 0, width:] = torch.nan
            b_table[slot, 0, :, width:] = torch.nan
            pack_slot(a_table[slot, 0], width)
    return stacked


@pytest.mark.parametrize("packed", [False, True], ids=["vLLM's slots", "packed slots"])
@pytest.mark.parametrize("widths", [[6], [6, 3, 5]], ids=["one slice", "three slices"])
@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES.keys())
def test_linear(slots: list[int], widths: list[int], packed: bool, generator: torch.Generator) -> None:
    wrapper = make_wrapper(slots)
    a, b = weights(widths, generator)
    for slot, rank in enumerate(RANKS):
        for t in a:
            t[slot, 0, rank:] = 0
    x = torch.randn(len(slots), INPUT, generator=generator)
    y = torch.randn(len(slots), sum(widths), generator=generator)
    expected = torch.cat(
        [by_rows(*parts, slots, 0.5) for parts in zip(y.split(widths, 1), [x] * len(widths), a, b, strict=True)], dim=1
    )
    if packed:
        a, b = as_tables(a, b, RANKS, wrapper)
    wrapper.add_lora_linear(y, x, a, b, 0.5, tuple(widths))
    torch.testing.assert_close(y, expected)


def test_many_adapters_with_a_row_each(generator: torch.Generator) -> None:
    count, rank = 64, 16
    wrapper = GroupedPunicaWrapper(128, 128, torch.device("cpu"))
    order = torch.randperm(count, generator=generator).tolist()
    ids = [slot + 1 for slot in order]
    wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(ids), is_prefill=True), list(range(1, count + 1)), count, 100)
    a, b = (torch.randn(count, 1, rows, columns, generator=generator) for rows, columns in ((rank, INPUT), (6, rank)))
    x, y = torch.randn(count, INPUT, generator=generator), torch.randn(count, 6, generator=generator)
    expected = by_rows(y, x, a, b, order)
    wrapper.add_lora_linear(y, x, (transposed_slots(a).copy_(a),), (transposed_slots(b).copy_(b),), 1.0, (6,))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


def test_adapter_of_another_rank_in_the_same_slot(generator: torch.Generator) -> None:
    """vLLM describes a step anew only when its rows or its slots have other adapters, by their ids."""
    slots = [0, 1, -1]
    wrapper = make_wrapper(slots)
    x = torch.randn(len(slots), INPUT, generator=generator)
    for ranks in ([1, 4], [4, 4], [2, 1]):
        a, b = weights([6], generator)
        for slot, rank in enumerate(ranks):
            a[0][slot, 0, rank:] = 0
        y = torch.randn(len(slots), 6, generator=generator)
        expected = by_rows(y, x, a[0], b[0], slots)
        wrapper.add_lora_linear(y, x, *as_tables(a, b, ranks, wrapper), 1.0, (6,))
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["vLLM's slots", "packed slots"])
def test_rows_without_an_adapter_are_not_touched_at_all(packed: bool, generator: torch.Generator) -> None:
    slots = BATCHES["base among adapters"]
    wrapper = make_wrapper(slots)
    a, b = weights([6], generator)
    if packed:
        a, b = as_tables(a, b, [RANK] * SLOTS, wrapper)
    x, y = torch.randn(len(slots), INPUT, generator=generator), torch.randn(len(slots), 6, generator=generator)
    before = y.clone()
    wrapper.add_lora_linear(y, x, a, b, 1.0, (6,))
    assert [bool((row == old).all()) for row, old in zip(y, before, strict=True)] == [slot < 0 for slot in slots]


@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES.keys())
def test_logits_wider_than_the_adapter(slots: list[int], generator: torch.Generator) -> None:
    (a,), (b,) = weights([6], generator)
    x, y = torch.randn(len(slots), INPUT, generator=generator), torch.randn(len(slots), 8, generator=generator)
    expected = torch.cat([by_rows(y[:, :6], x, a, b, slots), y[:, 6:]], dim=1)
    make_wrapper(slots).add_lora_logits(y, x, a, b, 1.0)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES.keys())
def test_shrink_then_expand_is_the_linear_of_sharded_layers(slots: list[int], generator: torch.Generator) -> None:
    widths = [6, 3]
    a, b = weights(widths, generator)
    x = torch.randn(len(slots), INPUT, generator=generator)
    sharded, whole = (torch.zeros(len(slots), 2 + sum(widths)) for _ in range(2))
    buffer = torch.zeros(2, len(slots), RANK)
    wrapper = make_wrapper(slots)
    wrapper.add_shrink(buffer, x, a, 0.5)
    wrapper.add_expand(sharded, buffer, b, tuple(widths), offset_start=2, add_inputs=True)
    wrapper.add_lora_linear(whole[:, 2:], x, a, b, 0.5, tuple(widths))
    torch.testing.assert_close(sharded, whole)


@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES.keys())
def test_embedding(slots: list[int], generator: torch.Generator) -> None:
    b = torch.randn(SLOTS, 1, 6, RANK, generator=generator)
    x, y = torch.randn(len(slots), RANK, generator=generator), torch.randn(len(slots), 6, generator=generator)
    identity = torch.eye(RANK).expand(SLOTS, 1, RANK, RANK)
    expected = by_rows(y, x, identity, b, slots)
    make_wrapper(slots).add_lora_embedding(y, x, b, add_input=True)
    torch.testing.assert_close(y, expected)


def test_whole_head_replaces_only_rows_of_adapters_that_bring_one(generator: torch.Generator) -> None:
    slots = [0, -1, 1, 0]
    weight = torch.randn(SLOTS, 1, 5, INPUT, generator=generator)
    bias = torch.randn(SLOTS, 5, generator=generator)
    x, y = torch.randn(4, INPUT, generator=generator), torch.randn(4, 5, generator=generator)
    expected = y.clone()
    for row in (0, 3):
        expected[row] = weight[0, 0] @ x[row] + bias[0]
    make_wrapper(slots).apply_lora_full_linear(y, x, weight, bias, torch.tensor([True, False, False]))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("rows", [2, MANY], ids=["few rows", "many rows"])
@pytest.mark.parametrize("packed", [False, True], ids=["vLLM's slots", "packed slots"])
def test_adapter_in_bfloat16_on_a_model_in_fp32(packed: bool, rows: int, generator: torch.Generator) -> None:
    slots = [0] * rows + [1] * rows
    wrapper = make_wrapper(slots)
    a, b = (tuple(t.bfloat16() for t in ts) for ts in weights([6], generator))
    x, y = torch.randn(2 * rows, INPUT, generator=generator), torch.zeros(2 * rows, 6)
    expected = by_rows(y, x, a[0].float(), b[0].float(), slots)
    if packed:
        a, b = as_tables(a, b, [RANK] * SLOTS, wrapper)
    wrapper.add_lora_linear(y, x, a, b, 1.0, (6,))
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.15)


def test_input_may_be_part_of_a_wider_one(generator: torch.Generator) -> None:
    slots = BATCHES["prompts and decode"]
    wrapper = make_wrapper(slots)
    a, b = weights([6], generator)
    x, y = torch.randn(len(slots), 2 * INPUT, generator=generator)[:, INPUT:], torch.zeros(len(slots), 6)
    expected = by_rows(y, x, a[0], b[0], slots)
    wrapper.add_lora_linear(y, x, *as_tables(a, b, [RANK] * SLOTS, wrapper), 1.0, (6,))
    torch.testing.assert_close(y, expected)


def test_a_decoding_step_is_one_bag_for_each_width_and_a_prompt_a_run() -> None:
    widths = {0: 4, 1: 4, 2: 2}
    made = plan(torch.tensor([2] * MANY + [0, 1, -1, 2, 0] + [1] * MANY), widths, max_rank=8)
    assert [(run.slot, run.width, run.rows) for run in made.runs] == [
        (2, 2, slice(0, MANY)),
        (1, 4, slice(MANY + 5, 2 * MANY + 5)),
    ]
    wide, narrow = made.bags
    assert (wide.width, wide.rows.tolist(), wide.slots_N.tolist()) == (4, [MANY, MANY + 1, MANY + 4], [0, 1, 0])
    assert (narrow.width, narrow.rows, narrow.slots_N.tolist()) == (2, slice(MANY + 3, MANY + 4), [2])
    assert plan(torch.tensor([3, 5, 4]), {}, max_rank=8).bags[0].rows == slice(0, 3)


def test_width_is_the_least_that_tiles_a_slot() -> None:
    assert [row_width(rank, 64) for rank in (0, 1, 3, 16, 17, 32, 33, 48, 64)] == [1, 1, 4, 16, 32, 32, 64, 64, 64]
    assert [row_width(rank, 320) for rank in (17, 33, 65, 300)] == [20, 40, 80, 320]


def test_rows_that_follow_each_other_are_a_slice() -> None:
    groups = dict(group_rows(torch.tensor([2, 2, -1, 0, 1, 1, 0])))
    assert groups[2] == slice(0, 2)
    assert groups[1] == slice(4, 6)
    assert groups[0].tolist() == [3, 6]
    assert -1 not in groups
