"""Grouped multi-LoRA against the definition, applied row by row."""

from __future__ import annotations

import pytest
import torch
from vllm.lora.layers import LoRAMapping

from f2l_vllm.cpu.punica import GroupedPunicaWrapper, group_rows

SLOTS, RANK, INPUT = 3, 4, 10
BATCHES = {
    "base only": [-1, -1, -1],
    "one adapter": [1, 1, 1],
    "base among adapters": [0, 0, -1, 2, 2, -1, 1],
    "repeated slots": [0, 1, 0, -1, 1, 0, 2],
    "decode of many": [2, 1, 0, -1],
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make_wrapper(slots: list[int]) -> GroupedPunicaWrapper:
    wrapper = GroupedPunicaWrapper(32, 32, torch.device("cpu"))
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


@pytest.mark.parametrize("widths", [[6], [6, 3, 5]], ids=["one slice", "three slices"])
@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES.keys())
def test_linear(slots: list[int], widths: list[int], generator: torch.Generator) -> None:
    a, b = weights(widths, generator)
    x = torch.randn(len(slots), INPUT, generator=generator)
    y = torch.randn(len(slots), sum(widths), generator=generator)
    expected = torch.cat(
        [by_rows(*parts, slots, 0.5) for parts in zip(y.split(widths, 1), [x] * len(widths), a, b, strict=True)], dim=1
    )
    make_wrapper(slots).add_lora_linear(y, x, a, b, 0.5, tuple(widths))
    torch.testing.assert_close(y, expected)


def test_rows_without_an_adapter_are_not_touched_at_all(generator: torch.Generator) -> None:
    slots = BATCHES["base among adapters"]
    a, b = weights([6], generator)
    x, y = torch.randn(len(slots), INPUT, generator=generator), torch.randn(len(slots), 6, generator=generator)
    before = y.clone()
    make_wrapper(slots).add_lora_linear(y, x, a, b, 1.0, (6,))
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


def test_adapter_in_bfloat16_on_a_model_in_fp32(generator: torch.Generator) -> None:
    a, b = (tuple(t.bfloat16() for t in ts) for ts in weights([6], generator))
    x, y = torch.randn(2, INPUT, generator=generator), torch.zeros(2, 6)
    make_wrapper([0, 1]).add_lora_linear(y, x, a, b, 1.0, (6,))
    expected = by_rows(torch.zeros(2, 6), x, a[0].float(), b[0].float(), [0, 1])
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.1)


def test_rows_that_follow_each_other_are_a_slice() -> None:
    groups = dict(group_rows(torch.tensor([2, 2, -1, 0, 1, 1, 0])))
    assert groups[2] == slice(0, 2)
    assert groups[1] == slice(4, 6)
    assert groups[0].tolist() == [3, 6]
    assert -1 not in groups
