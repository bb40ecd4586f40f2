"""The Perceiver: any number of tokens of one text layer in, one latent per LoRA rank row out.

The context is long and the latents are few, so only the projection to the latent width is computed per token.
With x the token scaled to unit root mean square and w the weight of the context's norm, a key enters only as
q . W_k (w * x) = (w * W_k^T q) . x and a value only as W_v (w * sum of p x). W_k and w therefore move into the queries,
and W_v is applied after the sum; x is the same for every block and computed once. Attention runs over blocks of tokens,
merged by the log-sum-exp of their scores.

Shape suffixes: N rows (each is a video's text layer; rows are independent), T tokens, D hidden size, d latent size,
Q latent queries, H query heads, G key/value heads, P query heads per key/value head, E head size, Z = G * Q * P.
Masks are True where a token is real.

Source: Frames2LoRA (arXiv 2606.04351), section 3. Every linear is bias-free and every norm an RMSNorm in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from f2l_vllm.hypernetwork.blocks import block_sizes, gated_mlp, mlp_in_blocks, packed

EXPANSION = 4  # hidden width of every MLP, in multiples of its reference width
NORM_EPS = 1e-6


def unit_rms(x: Tensor) -> Tensor:
    """x scaled to a root mean square of one over its last axis, computed in fp32, returned in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS).to(x.dtype)  # one kernel on a GPU


def _wide(x: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it has that."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """`unit_rms` times a learned weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * unit_rms(x)


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, size_in: int, size_hidden: int, size_out: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size_in, size_hidden, bias=False)
        self.up_proj = nn.Linear(size_in, size_hidden, bias=False)
        self.down_proj = nn.Linear(size_hidden, size_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return gated_mlp(x, *self.weights())

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of gate, up and down."""
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight


class GroupedAttention(nn.Module):
    """Latents attend to a context and to themselves, without causal order; groups of heads share key/value heads."""

    def __init__(self, size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.q_proj = nn.Linear(size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, size, bias=False)

    def forward(
        self,
        latents_NQd: Tensor,
        context_NTd: Tensor | None = None,
        norm_d: Tensor | None = None,
        mask_NT: Tensor | None = None,
    ) -> Tensor:
        """Attention output [N, Q, d].

        Args:
            latents_NQd: normed latents: they are the queries, and always also keys and values.
            context_NTd: tokens of unit root mean square, or None.
            norm_d: weight of the context's norm.
            mask_NT: the context's real tokens; None when all are.
        """
        queries_NZd = self._queries(latents_NQd)
        shares_NZQ, lse_NZ1 = _softmax(_wide(queries_NZd) @ _wide(latents_NQd).mT)
        if context_NTd is None:
            read_NZd = shares_NZQ.to(latents_NQd.dtype) @ latents_NQd
        else:
            assert norm_d is not None
            seen_NZd, seen_lse_NZ1 = _read(queries_NZd * norm_d, context_NTd, mask_NT)
            both_NZ1 = torch.logaddexp(lse_NZ1, seen_lse_NZ1)
            own_NZd = (shares_NZQ * torch.exp(lse_NZ1 - both_NZ1)) @ _wide(latents_NQd)
            seen_NZd = seen_NZd * torch.exp(seen_lse_NZ1 - both_NZ1)
            read_NZd = torch.addcmul(own_NZd, seen_NZd, norm_d.to(own_NZd.dtype)).to(latents_NQd.dtype)
        return self.o_proj(self._values(read_NZd, latents_NQd.shape[1]))

    def _queries(self, latents_NQd: Tensor) -> Tensor:
        """Scaled queries of all heads, mapped through W_k to the latent width: [N, Z, d]."""
        rows, _, size = latents_NQd.shape
        q_NQGPE = self.q_proj(latents_NQd).unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        q_GXE = q_NQGPE.permute(2, 0, 1, 3, 4).reshape(self.num_kv_heads, -1, self.head_dim) * self.head_dim**-0.5
        k_GEd = self.k_proj.weight.view(self.num_kv_heads, self.head_dim, size)
        return (q_GXE @ k_GEd).unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2)

    def _values(self, read_NZd: Tensor, count: int) -> Tensor:
        """What every head has read, mapped through W_v: [N, Q, H * E]."""
        rows, _, size = read_NZd.shape
        read_GXd = read_NZd.unflatten(1, (self.num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        v_GEd = self.v_proj.weight.view(self.num_kv_heads, self.head_dim, size)
        out_GNQPE = (read_GXd @ v_GEd.mT).unflatten(1, (rows, count, -1))
        return out_GNQPE.permute(1, 2, 0, 3, 4).flatten(2)


def _read(queries_NZd: Tensor, context_NTd: Tensor, mask_NT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention to keys that are their own values, block by block.

    Returns:
        what every query reads [N, Z, d], and the log-sum-exp of its scores [N, Z, 1].
    """
    rows, count, _ = queries_NZd.shape
    num_tokens = context_NTd.shape[1]
    # With gradients enabled, autograd keeps every block's scores, so blocks would save nothing.
    at_once = block_sizes(context_NTd.device).scores
    length = num_tokens if torch.is_grad_enabled() else max(1, at_once // (rows * count))
    parts: tuple[Tensor, Tensor] | None = None
    for start in range(0, num_tokens, length):
        block_NTd = context_NTd[:, start : start + length]
        scores_NZT = _wide(queries_NZd @ block_NTd.mT)
        if mask_NT is not None:
            # Not minus infinity: a block of padding only still needs a softmax; its weight in the merge is zero.
            padding_N1T = ~mask_NT[:, None, start : start + length]
            scores_NZT = scores_NZT.masked_fill(padding_N1T, torch.finfo(scores_NZT.dtype).min)
        shares_NZT, lse_NZ1 = _softmax(scores_NZT)
        read_NZd = _wide(shares_NZT.to(block_NTd.dtype) @ block_NTd)
        if parts is not None:
            before_NZd, before_lse_NZ1 = parts
            both_NZ1 = torch.logaddexp(before_lse_NZ1, lse_NZ1)
            read_NZd = before_NZd * torch.exp(before_lse_NZ1 - both_NZ1) + read_NZd * torch.exp(lse_NZ1 - both_NZ1)
            lse_NZ1 = both_NZ1
        parts = (read_NZd, lse_NZ1)
    assert parts is not None, "a context without tokens"
    return parts


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and its log-sum-exp, without a second exponential."""
    shares = torch.softmax(scores, dim=-1)
    return shares, scores.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()


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
        normed_NQd = self.input_latents_layernorm(latents_NQd)
        if self.cross:
            attended = self.self_attn(normed_NQd, context_NTd, self.input_context_layernorm.weight, mask_NT)
        else:
            attended = self.self_attn(normed_NQd)
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
        """context [N, T, d] of unit root mean square, mask [N, T] bool or None -> latents [N, Q, d]."""
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
        """features [N, T, D] of any dtype, mask [N, T] bool or None -> [N, num_outputs, d] in the weights' dtype."""
        return self.read(self.context(features_NTD), mask_NT)

    def context(self, features_NTD: Tensor, weights: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """Features of any dtype -> the input of `read`: projected, of unit root mean square, [N, T, d].

        `weights` are those of `packed_projection`, for inference; None means the parameters.
        """
        projection = self.modality_projection

        def project(features: Tensor) -> Tensor:
            features = features.to(projection.gate_proj.weight.dtype)
            return unit_rms(projection(features) if weights is None else gated_mlp(features, *weights))

        return mlp_in_blocks(project, features_NTD, projection.gate_proj.out_features)

    def packed_projection(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the projection's weights in a layout for faster products, if there is one."""
        gate, up, down = self.modality_projection.weights()
        rows = max(1, block_sizes(gate.device).hidden // len(gate))
        return packed(gate, rows), packed(up, rows), packed(down, rows)

    def read(self, context_NTd: Tensor, mask_NT: Tensor | None = None) -> Tensor:
        """`context` of N rows, mask [N, T] bool or None -> [N, num_outputs, d]."""
        return self.decoder(unit_rms(self.encoder(context_NTd, mask_NT)))


class LayerReader:
    """Takes the features of one text layer after the other; keeps only each layer's context, until it is read.

    As many layers as `block_sizes` of the device allow are projected together, and then read together: the weights
    that act on a row's few latents are far larger than the latents, so more rows at a time cost hardly more.
    Nothing here waits for the device.
    """

    def __init__(self, perceiver: Perceiver, mask_BT: Tensor | None = None) -> None:
        self._perceiver = perceiver
        self._mask_BT = mask_BT
        self._weights = None if torch.is_grad_enabled() else perceiver.packed_projection()
        self._features: list[Tensor] = []
        self._contexts: list[Tensor] = []
        self._unread = 0  # layers since the last read
        self._latents: list[Tensor] = []

    def add(self, features_BTD: Tensor) -> None:
        """Take the next layer's features; nobody may write to them afterwards."""
        sizes, projection = block_sizes(features_BTD.device), self._perceiver.modality_projection
        tokens = features_BTD.shape[0] * features_BTD.shape[1]
        self._features.append(features_BTD)
        self._unread += 1
        if (self._unread + 1) * tokens * projection.down_proj.out_features > sizes.context:
            self._read()
        elif (len(self._features) + 1) * tokens * projection.gate_proj.out_features > sizes.hidden:
            self._project()

    def latents(self) -> Tensor:
        """Latents of all layers so far, [B, L, num_outputs, d]."""
        if self._unread:
            self._read()
        return torch.cat(self._latents).transpose(0, 1)

    def _project(self) -> None:
        self._contexts.append(self._perceiver.context(_joined(self._features), self._weights))

    def _read(self) -> None:
        if self._features:
            self._project()
        mask_NT = None if self._mask_BT is None else self._mask_BT.repeat(self._unread, 1)
        latents_NQd = self._perceiver.read(_joined(self._contexts), mask_NT)
        self._latents.append(latents_NQd.unflatten(0, (self._unread, -1)))
        self._unread = 0


def _joined(parts: list[Tensor]) -> Tensor:
    """All parts as one tensor; the list is emptied."""
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    parts.clear()
    return whole
