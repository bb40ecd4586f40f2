"""The Perceiver: any number of tokens of one text layer in, one latent per LoRA rank row out.

Shape suffixes: N rows (a video's text layer each; nothing crosses rows), T tokens, D hidden size, d latent size,
Q latent queries, S keys (T + Q, or Q), H query heads, G key/value heads, E head size. Masks are True where a token
is real.

Source: Frames2LoRA (arXiv 2606.04351), section 3. Every linear is bias-free and every norm an RMSNorm in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4  # hidden width of every MLP, in multiples of its reference width
NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32 (fp64 input stays fp64), returned in x's dtype."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
        return self.weight * normed.to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, size_in: int, size_hidden: int, size_out: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size_in, size_hidden, bias=False)
        self.up_proj = nn.Linear(size_in, size_hidden, bias=False)
        self.down_proj = nn.Linear(size_hidden, size_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GroupedAttention(nn.Module):
    """Latents attend, without a causal order, to a context and to themselves; key/value heads are shared by groups."""

    def __init__(self, size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, size, bias=False)

    def forward(self, latents_NQd: Tensor, context_NTd: Tensor | None, mask_NT: Tensor | None) -> Tensor:
        """Return [N, Q, d]. Padded context tokens get no weight; the latents themselves always count."""
        source_NSd = latents_NQd if context_NTd is None else torch.cat((context_NTd, latents_NQd), dim=1)
        q_NHQE = self._split(self.q_proj(latents_NQd))
        k_NGSE = self._split(self.k_proj(source_NSd))
        v_NGSE = self._split(self.v_proj(source_NSd))
        mask_N11S = None
        if context_NTd is not None and mask_NT is not None:
            mask_N11S = F.pad(mask_NT, (0, latents_NQd.shape[1]), value=True)[:, None, None]
        out_NHQE = F.scaled_dot_product_attention(q_NHQE, k_NGSE, v_NGSE, attn_mask=mask_N11S, enable_gqa=True)
        return self.o_proj(out_NHQE.transpose(1, 2).flatten(2))

    def _split(self, x_NSX: Tensor) -> Tensor:
        return x_NSX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class ResamplerLayer(nn.Module):
    """One attention layer and one MLP, each with a norm before and after. Without `cross`, latents see only latents."""

    def __init__(self, size: int, num_heads: int, num_kv_heads: int, head_dim: int, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.input_latents_layernorm = RMSNorm(size)
        if cross:
            self.input_context_layernorm = RMSNorm(size)
        self.self_attn = GroupedAttention(size, num_heads, num_kv_heads, head_dim)
        self.post_attention_layernorm = RMSNorm(size)
        self.pre_ff_layernorm = RMSNorm(size)
        self.post_ff_layernorm = RMSNorm(size)
        self.mlp = GatedMLP(size, EXPANSION * size, size)

    def forward(self, latents_NQd: Tensor, context_NTd: Tensor, mask_NT: Tensor | None) -> Tensor:
        context = self.input_context_layernorm(context_NTd) if self.cross else None
        attended = self.self_attn(self.input_latents_layernorm(latents_NQd), context, mask_NT)
        latents_NQd = latents_NQd + self.post_attention_layernorm(attended)
        return latents_NQd + self.post_ff_layernorm(self.mlp(self.pre_ff_layernorm(latents_NQd)))


class Resampler(nn.Module):
    """Learned queries that read a context through blocks of one cross-attention and some self-attention layers."""

    def __init__(
        self, size: int, num_queries: int, num_blocks: int, self_attn: int, heads: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.latents_q = nn.Parameter(torch.empty(num_queries, size))
        kinds = ([True] + [False] * self_attn) * num_blocks
        self.layers = nn.ModuleList(ResamplerLayer(size, *heads, cross=cross) for cross in kinds)
        self.layernorm = RMSNorm(size)

    def forward(self, context_NTd: Tensor, mask_NT: Tensor | None = None) -> Tensor:
        """context [N, T, d], mask [N, T] bool or None -> latents [N, Q, d]."""
        latents_NQd = self.latents_q.expand(context_NTd.shape[0], -1, -1)
        for layer in self.layers:
            latents_NQd = layer(latents_NQd, context_NTd, mask_NT)
        return self.layernorm(latents_NQd)


class Perceiver(nn.Module):
    """Projection to the latent width, an encoder that reads the tokens, a decoder with one query per rank row."""

    def __init__(
        self,
        feature_size: int,
        latent_size: int,
        num_latents: int,
        num_outputs: int,
        num_blocks: int,
        num_self_attn_per_block: int,
        heads: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.modality_projection = GatedMLP(feature_size, EXPANSION * feature_size, latent_size)
        self.encoder = Resampler(latent_size, num_latents, num_blocks, num_self_attn_per_block, heads)
        self.decoder = Resampler(latent_size, num_outputs, num_blocks=1, self_attn=0, heads=heads)

    def forward(self, features_NTD: Tensor, mask_NT: Tensor | None = None) -> Tensor:
        """features [N, T, D], mask [N, T] bool or None -> [N, num_outputs, d]."""
        return self.decoder(self.encoder(self.modality_projection(features_NTD), mask_NT))
