"""Paged attention for decoder layers in plain PyTorch.

The cache of a layer is a sequence of pages, each token-major: `[block_size, kv_heads, 2 * head_size]`, keys before
values. Slot `block * block_size + offset` is therefore one row of the cache seen as `[slots, kv_heads, 2 * head_size]`,
and physically consecutive blocks are one slice of it. Seen as `[slots * kv_heads * 2, head_size]`, a row is one key or
one value of one head.

Requests that decode are computed together. PyTorch's attention calls a matrix product for every head of every request,
and for a single query the call costs more than the product. Here one batched product of gathered keys gives all scores,
and one `embedding_bag` all outputs: it sums the values in place, weighted by the probabilities.

T query tokens of the batch, H query heads, K kv heads, G = H / K, D head size, S slots, L keys of a request, B requests
that decode together, b = B * K, N query tokens of one request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

MAX_KEYS_PER_CALL = 4096
"""Keys of several requests that one call gathers: so many stay within the processor's cache."""
KEYS_WORTH_A_CALL = 256
"""One more call costs as much time as reading this many keys."""


@dataclass(frozen=True)
class Prompt:
    """Several tokens of one request."""

    start: int
    end: int
    """Its rows of the batch."""
    slots_L: slice | torch.Tensor
    """A slice if the blocks are physically consecutive: a slice needs no copy."""
    mask_NL: torch.Tensor | None
    """True where a query sees a key; None if `causal` suffices."""
    causal: bool


@dataclass(frozen=True)
class DecodeGroup:
    """Requests with one query each, computed in one call."""

    rows_B: slice | torch.Tensor
    slots_BL: torch.Tensor
    """Rows shorter than L repeat their last slot."""
    mask_B1L: torch.Tensor | None
    """Added to the scores, fp32: 0 for a key, -inf beyond a request's last key; None if all requests have L keys."""
    _rows: dict[tuple[int, int], DecodeRows] = field(default_factory=dict)

    def cache_rows(self, kv_heads: int, group: int) -> DecodeRows:
        """Where keys and values lie; the same for every layer of a step with these numbers of heads."""
        rows = self._rows.get((kv_heads, group))
        if rows is None:
            keys_BKL = 2 * (self.slots_BL[:, None] * kv_heads + torch.arange(kv_heads)[:, None])
            values_BKGL = (keys_BKL + 1)[:, :, None].expand(-1, -1, group, -1)
            starts = torch.arange(0, values_BKGL.numel(), values_BKGL.shape[-1])
            mask = None if self.mask_B1L is None else self.mask_B1L.repeat_interleave(kv_heads, 0)
            rows = DecodeRows(keys_BKL.view(-1), values_BKGL.reshape(-1), starts, mask)
            self._rows[kv_heads, group] = rows
        return rows


@dataclass(frozen=True)
class DecodeRows:
    """Rows of the cache seen as `[S * K * 2, D]`."""

    keys: torch.Tensor
    """`[b * L]`"""
    values: torch.Tensor
    """`[b * G * L]`"""
    starts: torch.Tensor
    """`[b * G]`, where the values of each query head begin."""
    mask_b1L: torch.Tensor | None


@dataclass(frozen=True)
class TorchAttentionMetadata(AttentionMetadata):
    """The metadata that all layers of a step share."""

    prompts: list[Prompt]
    decodes: list[DecodeGroup]


class TorchAttentionBackend(AttentionBackend):
    """Causal decoder attention; `validate_configuration` refuses everything else."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[TorchAttentionImpl]:
        return TorchAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TorchAttentionMetadataBuilder]:
        return TorchAttentionMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)


class TorchAttentionMetadataBuilder(AttentionMetadataBuilder[TorchAttentionMetadata]):
    """Turns vLLM's description of a step into prompts and decode groups."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TorchAttentionMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("f2l-vllm's CPU platform serves causal attention only.")
        return plan(
            common.query_start_loc[: common.num_reqs + 1].tolist(),
            common.seq_lens[: common.num_reqs].tolist(),
            common.block_table_tensor,
            self.block_size,
        )


def plan(starts: list[int], num_keys: list[int], block_table: torch.Tensor, block_size: int) -> TorchAttentionMetadata:
    """Divide a batch into prompts, or parts of them, and groups that decode.

    Args:
        starts: first query row of each request, then the number of rows.
        num_keys: keys of each request, its queries' own included.
        block_table: `[>= requests, blocks]`, physical block of each logical block.
        block_size: tokens per block.
    """
    prompts, decoding = [], []
    for request, keys in enumerate(num_keys):
        start, end = starts[request], starts[request + 1]
        if end - start > 1:
            prompts.append(_prompt(start, end, keys, block_table[request], block_size))
        elif end > start:
            decoding.append(request)
    groups = []
    for requests in _groups(decoding, num_keys):
        rows, keys_B = [starts[request] for request in requests], [num_keys[request] for request in requests]
        blocks = block_table[torch.tensor(requests)]
        groups.append(_decode_group(_rows(rows), torch.tensor(keys_B), blocks, block_size))
    return TorchAttentionMetadata(prompts, groups)


def _groups(requests: list[int], num_keys: list[int]) -> list[list[int]]:
    """Divide requests so that padding to the longest of a group costs less than more calls would."""
    groups: list[list[int]] = []
    longest = 0
    left = sorted(requests, key=lambda request: -num_keys[request])
    for place, request in enumerate(left):
        keys = num_keys[request]
        is_short = 2 * keys <= longest and (longest - keys) * (len(left) - place) > KEYS_WORTH_A_CALL
        if not groups or is_short or (len(groups[-1]) + 1) * longest > MAX_KEYS_PER_CALL:
            groups.append([])
            longest = keys
        groups[-1].append(request)
    return [sorted(group) for group in groups]


def _rows(rows: list[int]) -> slice | torch.Tensor:
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else torch.tensor(rows)


def _prompt(start: int, end: int, keys: int, blocks: torch.Tensor, block_size: int) -> Prompt:
    queries = end - start
    blocks = blocks[: -(-keys // block_size)].to(torch.long)
    first = int(blocks[0])
    slots_L: slice | torch.Tensor
    if bool((blocks == torch.arange(first, first + len(blocks))).all()):
        slots_L = slice(first * block_size, first * block_size + keys)
    else:
        slots_L = (blocks[:, None] * block_size + torch.arange(block_size)).view(-1)[:keys]
    mask_NL = None
    if queries < keys:  # the queries are the last ones: query i sees keys up to keys - queries + i
        mask_NL = torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)
    return Prompt(start, end, slots_L, mask_NL, causal=queries == keys)


def _decode_group(
    rows_B: slice | torch.Tensor, keys_B: torch.Tensor, blocks: torch.Tensor, block_size: int
) -> DecodeGroup:
    position_L = torch.arange(int(keys_B.max()))
    position_BL = torch.minimum(position_L, keys_B[:, None] - 1)
    slots_BL = blocks.to(torch.long).gather(1, position_BL // block_size) * block_size + position_BL % block_size
    hidden_BL = position_L >= keys_B[:, None]
    mask_BL = torch.zeros(hidden_BL.shape).masked_fill_(hidden_BL, -math.inf) if bool(hidden_BL.any()) else None
    return DecodeGroup(rows_B, slots_BL, None if mask_BL is None else mask_BL[:, None])


class TorchAttentionImpl(AttentionImpl[TorchAttentionMetadata]):
    """Attention of one layer.

    Raises:
        NotImplementedError: the layer asks for anything but plain causal attention; the message names it.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "a soft cap on logits": bool(logits_soft_cap),
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "a KV cache shared between layers": kv_sharing_target_layer_name is not None,
            "attention sinks": sinks is not None,
        }
        if wanted := [name for name, asked in unsupported.items() if asked]:
            raise NotImplementedError(f"f2l-vllm's CPU platform does not support {', '.join(wanted)}.")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the new tokens' keys and values, each `[>= T, K, D]`, to the slots in `slot_mapping` `[T]`."""
        size = self.head_size
        cache_SKC = _as_slots(kv_cache)
        key, value = key[: len(slot_mapping)], value[: len(slot_mapping)]
        real = slot_mapping >= 0
        if not bool(real.all()):
            slot_mapping, key, value = slot_mapping[real], key[real], value[real]
        cache_SKC[..., :size].index_copy_(0, slot_mapping, key.view(-1, self.num_kv_heads, size))
        cache_SKC[..., size:].index_copy_(0, slot_mapping, value.view(-1, self.num_kv_heads, size))

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TorchAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend `query` `[T, H, D]` to the cache and write `output`, of the same shape or `[T, H * D]`."""
        if attn_metadata is None:  # a profiling run has no requests
            return output.fill_(0)
        heads, size = self.num_heads, self.head_size
        query_THD, output_THD = query.view(-1, heads, size), output.view(-1, heads, size)
        cache_SKC = _as_slots(kv_cache)

        for decode in attn_metadata.decodes:
            self._decode(decode, query_THD, cache_SKC, output_THD)

        for prompt in attn_metadata.prompts:
            rows = slice(prompt.start, prompt.end)
            kv_1KLC = cache_SKC[prompt.slots_L].transpose(0, 1)[None]
            out_1HND = F.scaled_dot_product_attention(
                query_THD[rows].transpose(0, 1)[None],
                kv_1KLC[..., :size],
                kv_1KLC[..., size:],
                attn_mask=prompt.mask_NL,
                is_causal=prompt.causal,
                scale=self.scale,
                enable_gqa=heads > self.num_kv_heads,
            )
            output_THD[rows] = out_1HND[0].transpose(0, 1)
        return output

    def _decode(
        self, decode: DecodeGroup, query_THD: torch.Tensor, cache_SKC: torch.Tensor, output_THD: torch.Tensor
    ) -> None:
        heads, kv_heads, size = self.num_heads, self.num_kv_heads, self.head_size
        cache_rows = cache_SKC.view(-1, size)
        rows = decode.cache_rows(kv_heads, heads // kv_heads)
        # The query heads of a kv head are the rows of one product, so that keys need no repetition. Scores are fp32, as
        # in PyTorch's attention.
        q_bGD = query_THD[decode.rows_B].reshape(-1, heads // kv_heads, size).float() * self.scale
        k_bDL = cache_rows.index_select(0, rows.keys).view(len(q_bGD), -1, size).float().transpose(1, 2)
        scores_bGL = torch.bmm(q_bGD, k_bDL) if rows.mask_b1L is None else torch.baddbmm(rows.mask_b1L, q_bGD, k_bDL)
        weights = scores_bGL.softmax(-1).to(cache_rows.dtype).view(-1)
        out = F.embedding_bag(rows.values, cache_rows, rows.starts, mode="sum", per_sample_weights=weights)
        output_THD[decode.rows_B] = out.view(-1, heads, size)


def _as_slots(kv_cache: torch.Tensor) -> torch.Tensor:
    """`[slots, K, 2 D]` view of a layer's cache, whose logical shape in vLLM is `[blocks, K, block_size, 2 D]`."""
    return kv_cache.transpose(1, 2).view(-1, kv_cache.shape[1], kv_cache.shape[3])
