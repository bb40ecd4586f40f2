"""Paged attention for decoder layers in plain PyTorch.

The cache of a layer is a sequence of pages, each token-major: `[block_size, kv_heads, 2 * head_size]`, keys before
values. Slot `block * block_size + offset` is therefore one row of the cache seen as `[slots, kv_heads, 2 * head_size]`,
and blocks that follow each other physically are one slice of it.

T query tokens of the batch, H query heads, K kv heads, G = H / K, D head size, S slots, L keys of a request, B requests
that decode together, N query tokens of one request.
"""

from __future__ import annotations

from dataclasses import dataclass
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

# Decoding requests are attended together when their keys are few: one gather and one call cost less than a call per
# request. With more keys the copy falls out of the CPU's cache, and reading each request's pages in place is faster.
MAX_KEYS_TO_BATCH = 512
MAX_KEYS_PER_CALL = 4096


@dataclass(frozen=True)
class Span:
    """One request attended on its own: its query rows and where its keys are."""

    start: int
    end: int
    slots_L: slice | torch.Tensor
    """A slice where the blocks are physically consecutive, which needs no copy."""
    mask_NL: torch.Tensor | None
    """True where a query sees a key; None for a single query, or where `causal` says it all."""
    causal: bool


@dataclass(frozen=True)
class DecodeGroup:
    """Requests with one query each and a similar number of keys, attended in one call."""

    rows_B: torch.Tensor
    slots_BL: torch.Tensor
    """Rows shorter than L repeat their last slot."""
    mask_B11L: torch.Tensor | None
    """None where all rows have L keys."""


@dataclass(frozen=True)
class TorchAttentionMetadata(AttentionMetadata):
    """What every layer of a step shares."""

    spans: list[Span]
    groups: list[DecodeGroup]


class TorchAttentionBackend(AttentionBackend):
    """Causal decoder attention; everything else is refused by `validate_configuration`."""

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
    """Turns vLLM's description of a step into spans and decode groups."""

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
    """Divide a batch into decode groups and spans.

    Args:
        starts: first query row of each request, then the number of rows.
        num_keys: keys of each request, its queries' own included.
        block_table: `[>= requests, blocks]`, physical block of each logical block.
        block_size: tokens per block.
    """
    spans: list[Span] = []
    short_decodes: dict[int, list[int]] = {}
    for request, keys in enumerate(num_keys):
        start, end = starts[request], starts[request + 1]
        if start == end:
            continue
        if end - start == 1 and keys <= MAX_KEYS_TO_BATCH:
            # Powers of two bound the padding to half of what is read.
            short_decodes.setdefault((keys - 1).bit_length(), []).append(request)
        else:
            spans.append(_span(start, end, keys, block_table[request], block_size))
    groups = []
    for power, requests in short_decodes.items():
        size = MAX_KEYS_PER_CALL >> power
        for first in range(0, len(requests), size):
            members = requests[first : first + size]
            if len(members) == 1:
                start, keys = starts[members[0]], num_keys[members[0]]
                spans.append(_span(start, start + 1, keys, block_table[members[0]], block_size))
            else:
                rows_B = torch.tensor([starts[request] for request in members])
                keys_B = torch.tensor([num_keys[request] for request in members])
                groups.append(_decode_group(rows_B, keys_B, block_table[torch.tensor(members)], block_size))
    return TorchAttentionMetadata(spans, groups)


def _span(start: int, end: int, keys: int, blocks: torch.Tensor, block_size: int) -> Span:
    queries = end - start
    blocks = blocks[: -(-keys // block_size)].to(torch.long)
    first = int(blocks[0])
    slots_L: slice | torch.Tensor
    if bool((blocks == torch.arange(first, first + len(blocks))).all()):
        slots_L = slice(first * block_size, first * block_size + keys)
    else:
        slots_L = (blocks[:, None] * block_size + torch.arange(block_size)).view(-1)[:keys]
    mask_NL = None
    if 1 < queries < keys:  # the queries are the last ones: query i sees keys up to keys - queries + i
        mask_NL = torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)
    return Span(start, end, slots_L, mask_NL, causal=queries == keys)


def _decode_group(rows_B: torch.Tensor, keys_B: torch.Tensor, blocks: torch.Tensor, block_size: int) -> DecodeGroup:
    position_L = torch.arange(int(keys_B.max()))
    position_BL = torch.minimum(position_L, keys_B[:, None] - 1)
    slots_BL = blocks.to(torch.long).gather(1, position_BL // block_size) * block_size + position_BL % block_size
    visible_BL = position_L < keys_B[:, None]
    return DecodeGroup(rows_B, slots_BL, None if bool(visible_BL.all()) else visible_BL[:, None, None])


class TorchAttentionImpl(AttentionImpl[TorchAttentionMetadata]):
    """Attention of one layer.

    Raises:
        NotImplementedError: the layer asks for anything but plain causal attention, naming what.
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
        """Write the new tokens' keys and values, each `[>= T, K, D]`, to the slots `slot_mapping` `[T]` names."""
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
        heads, kv_heads, size = self.num_heads, self.num_kv_heads, self.head_size
        group = heads // kv_heads
        query_THD, output_THD = query.view(-1, heads, size), output.view(-1, heads, size)
        cache_SKC = _as_slots(kv_cache)

        for decode in attn_metadata.groups:
            # The query heads of a kv head become the query axis, so that keys and values are not repeated.
            q_BKGD = query_THD[decode.rows_B].view(-1, kv_heads, group, size)
            kv_BKLC = cache_SKC[decode.slots_BL].transpose(1, 2)
            out_BKGD = F.scaled_dot_product_attention(
                q_BKGD, kv_BKLC[..., :size], kv_BKLC[..., size:], attn_mask=decode.mask_B11L, scale=self.scale
            )
            output_THD[decode.rows_B] = out_BKGD.reshape(-1, heads, size)

        for span in attn_metadata.spans:
            kv_1KLC = cache_SKC[span.slots_L].transpose(0, 1)[None]
            k_1KLD, v_1KLD = kv_1KLC[..., :size], kv_1KLC[..., size:]
            if span.end - span.start == 1:
                q_1KGD = query_THD[span.start].view(1, kv_heads, group, size)
                out_1KGD = F.scaled_dot_product_attention(q_1KGD, k_1KLD, v_1KLD, scale=self.scale)
                output_THD[span.start] = out_1KGD.reshape(heads, size)
            else:
                q_1HND = query_THD[span.start : span.end].transpose(0, 1)[None]
                out_1HND = F.scaled_dot_product_attention(
                    q_1HND,
                    k_1KLD,
                    v_1KLD,
                    attn_mask=span.mask_NL,
                    is_causal=span.causal,
                    scale=self.scale,
                    enable_gqa=group > 1,
                )
                output_THD[span.start : span.end] = out_1HND[0].transpose(0, 1)
        return output


def _as_slots(kv_cache: torch.Tensor) -> torch.Tensor:
    """`[slots, K, 2 D]` view of a layer's cache, whose logical shape in vLLM is `[blocks, K, block_size, 2 D]`."""
    return kv_cache.transpose(1, 2).view(-1, kv_cache.shape[1], kv_cache.shape[3])
