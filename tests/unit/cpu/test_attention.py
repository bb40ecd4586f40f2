"""Paged attention against attention written out densely, request by request."""

from __future__ import annotations

import math

import pytest
import torch

from f2l_vllm.cpu.attention import (
    MAX_KEYS_PER_CALL,
    DecodeGroup,
    TorchAttentionImpl,
    plan,
)

HEADS, KV_HEADS, SIZE, BLOCK = 6, 2, 8, 16


class Batch:
    """Requests of `(new tokens, tokens in all)`, whose earlier tokens are already in the cache."""

    def __init__(self, requests: list[tuple[int, int]], *, scattered: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        blocks_of = [-(-total // BLOCK) for _, total in requests]
        num_blocks = sum(blocks_of) + 1
        order = torch.randperm(num_blocks - 1, generator=generator) if scattered else torch.arange(num_blocks - 1)
        self.table = torch.zeros(len(requests), max(blocks_of), dtype=torch.int32)
        used = 0
        for row, count in enumerate(blocks_of):
            self.table[row, :count] = order[used : used + count] + 1
            used += count
        self.requests = requests
        self.starts = [0, *torch.tensor([new for new, _ in requests]).cumsum(0).tolist()]
        tokens = self.starts[-1]
        self.query, self.key, self.value = (
            torch.randn(tokens, heads, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        # As vLLM allocates it: logically heads before tokens, physically tokens before heads. Unwritten slots hold
        # what a recycled block may hold.
        physical = torch.full((num_blocks, BLOCK, KV_HEADS, 2 * SIZE), math.nan)
        self.kv_cache = physical.transpose(1, 2)
        self.past = [torch.randn(total - new, KV_HEADS, 2 * SIZE, generator=generator) for new, total in requests]
        for row, past in enumerate(self.past):
            for position, kv in enumerate(past):
                physical[self.table[row, position // BLOCK], position % BLOCK] = kv
        self.slots = torch.tensor(
            [
                int(self.table[row, position // BLOCK]) * BLOCK + position % BLOCK
                for row, (new, total) in enumerate(requests)
                for position in range(total - new, total)
            ]
        )

    def attend(self, impl: TorchAttentionImpl) -> torch.Tensor:
        impl.do_kv_cache_update(None, self.key, self.value, self.kv_cache, self.slots)
        metadata = plan(self.starts, [total for _, total in self.requests], self.table, BLOCK)
        output = torch.full_like(self.query, math.nan)
        return impl.forward(None, self.query, self.key, self.value, self.kv_cache, metadata, output)

    def expected(self, scale: float) -> torch.Tensor:
        outputs = []
        for row, (new, total) in enumerate(self.requests):
            rows = slice(self.starts[row], self.starts[row + 1])
            key = torch.cat([self.past[row][..., :SIZE], self.key[rows]]).repeat_interleave(HEADS // KV_HEADS, 1)
            value = torch.cat([self.past[row][..., SIZE:], self.value[rows]]).repeat_interleave(HEADS // KV_HEADS, 1)
            scores = torch.einsum("qhd,khd->hqk", self.query[rows], key) * scale
            position = torch.arange(total - new, total)
            scores = scores.masked_fill(torch.arange(total) > position[:, None], -math.inf)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
        return torch.cat(outputs)


@pytest.fixture
def impl() -> TorchAttentionImpl:
    return TorchAttentionImpl(HEADS, SIZE, 0.3, KV_HEADS)


CASES = {
    "prefill": [(1, 1), (5, 5), (40, 40)],
    "chunk after cached tokens": [(7, 40), (16, 32), (2, 17)],
    "decode, unequal lengths": [(1, 3), (1, 16), (1, 17), (1, 60), (1, 33), (1, 64)],
    "decode, equal lengths": [(1, 20), (1, 20), (1, 20)],
    "decode, one request": [(1, 20)],
    "decode, long": [(1, 700), (1, 513), (1, 1000)],
    "decode, too long to batch": [(1, MAX_KEYS_PER_CALL + 1), (1, 30), (1, MAX_KEYS_PER_CALL // 2 + 30)],
    "decode among prompts": [(1, 20), (4, 4), (1, 90), (1, 33), (8, 20), (1, 1)],
    "everything at once": [(1, 9), (12, 30), (1, 600), (20, 20), (1, 10), (3, 50)],
    "a request without new tokens": [(1, 9), (0, 30), (1, 12)],
}


@pytest.mark.parametrize("scattered", [False, True], ids=["consecutive blocks", "scattered blocks"])
@pytest.mark.parametrize("requests", CASES.values(), ids=CASES.keys())
def test_equals_dense_attention(impl: TorchAttentionImpl, requests: list[tuple[int, int]], scattered: bool) -> None:
    batch = Batch(requests, scattered=scattered)
    torch.testing.assert_close(batch.attend(impl), batch.expected(impl.scale), rtol=1e-5, atol=1e-5)


def test_consecutive_blocks_are_read_without_a_copy() -> None:
    prompt = plan([0, 30], [30], torch.tensor([[4, 5]]), BLOCK).prompts[0]
    assert prompt.slots_L == slice(4 * BLOCK, 4 * BLOCK + 30)


def groups_of(lengths: list[int]) -> list[list[int]]:
    """Rows of the batch that decode in each call."""
    blocks = -(-max(lengths) // BLOCK)
    table = torch.arange(len(lengths) * blocks).view(len(lengths), blocks)
    metadata = plan(list(range(len(lengths) + 1)), lengths, table, BLOCK)
    assert not metadata.prompts
    assert all(group.slots_BL.shape[1] == max(lengths[row] for row in rows_of(group)) for group in metadata.decodes)
    return [rows_of(group) for group in metadata.decodes]


def rows_of(group: DecodeGroup) -> list[int]:
    rows = group.rows_B
    return list(range(rows.start, rows.stop)) if isinstance(rows, slice) else rows.tolist()


def test_many_decode_in_few_calls_of_bounded_size() -> None:
    lengths = [400 + row % 50 for row in range(40)]
    groups = groups_of(lengths)
    assert sorted(row for rows in groups for row in rows) == list(range(40))
    assert max(len(rows) * max(lengths[row] for row in rows) for rows in groups) <= MAX_KEYS_PER_CALL
    assert len(groups) == 5


def test_requests_are_padded_where_that_costs_less_than_a_call() -> None:
    assert groups_of([10, 40, 90, 25]) == [[0, 1, 2, 3]]
    assert groups_of([900, 20, 800, 30] + [25] * 10) == [[0, 2], [1, 3, *range(4, 14)]]
    assert groups_of([MAX_KEYS_PER_CALL + 1, 5]) == [[0], [1]]


def test_padding_tokens_are_not_written(impl: TorchAttentionImpl) -> None:
    batch = Batch([(3, 3)], scattered=False)
    before = batch.kv_cache.clone()
    impl.do_kv_cache_update(None, batch.key, batch.value, batch.kv_cache, torch.tensor([-1, 17, -1]))
    changed = (batch.kv_cache != before) & ~(batch.kv_cache.isnan() & before.isnan())
    assert changed.nonzero()[:, 0].unique().tolist() == [1]
    assert changed.nonzero()[:, 2].unique().tolist() == [1]
    torch.testing.assert_close(batch.kv_cache[1, :, 1, :SIZE], batch.key[1])


def test_bfloat16_stays_close_to_fp32(impl: TorchAttentionImpl) -> None:
    batch = Batch(CASES["everything at once"], scattered=True)
    expected = batch.expected(impl.scale)
    for name in ("query", "key", "value"):
        setattr(batch, name, getattr(batch, name).bfloat16())
    batch.kv_cache = batch.kv_cache.transpose(1, 2).bfloat16().transpose(1, 2)
    torch.testing.assert_close(batch.attend(impl).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sliding_window": 8}, "sliding window"),
        ({"sinks": torch.zeros(HEADS)}, "sinks"),
        ({"alibi_slopes": [0.1] * HEADS}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft cap"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "shared between layers"),
    ],
)
def test_other_attention_is_refused_by_name(options: dict, said: str) -> None:
    with pytest.raises(NotImplementedError, match=said):
        TorchAttentionImpl(HEADS, SIZE, 0.3, KV_HEADS, **options)
