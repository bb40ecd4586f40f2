"""The method, literally: one token, one head, one layer at a time, in float64. Slow, and written to be read.

Independent of the package: only the released tensor names are shared. Source: Frames2LoRA (arXiv 2606.04351).
"""

from __future__ import annotations

import math

import numpy as np

Weights = dict[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def rms_norm(x_d: np.ndarray, weight_d: np.ndarray) -> np.ndarray:
    return x_d / math.sqrt(float(np.mean(x_d**2)) + 1e-6) * weight_d


def layer_norm(x_d: np.ndarray, weight_d: np.ndarray, bias_d: np.ndarray) -> np.ndarray:
    return (x_d - x_d.mean()) / math.sqrt(float(x_d.var()) + 1e-5) * weight_d + bias_d


def gated_mlp(x_d: np.ndarray, weights: Weights, prefix: str) -> np.ndarray:
    gate = weights[f"{prefix}.gate_proj.weight"] @ x_d
    up = weights[f"{prefix}.up_proj.weight"] @ x_d
    return weights[f"{prefix}.down_proj.weight"] @ (silu(gate) * up)


def attention(
    queries: list[np.ndarray], sources: list[np.ndarray], weights: Weights, prefix: str, heads: int, kv_heads: int
) -> list[np.ndarray]:
    """Softmax attention of every query to every source; query heads share key/value heads in equal groups."""
    size = weights[f"{prefix}.q_proj.weight"].shape[0] // heads
    keys = [weights[f"{prefix}.k_proj.weight"] @ source for source in sources]
    values = [weights[f"{prefix}.v_proj.weight"] @ source for source in sources]
    outputs = []
    for query in queries:
        q = weights[f"{prefix}.q_proj.weight"] @ query
        parts = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            mine, theirs = slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)
            scores = np.array([float(q[mine] @ key[theirs]) / math.sqrt(size) for key in keys])
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            parts.append(sum(share * value[theirs] for share, value in zip(shares, values, strict=True)))
        outputs.append(weights[f"{prefix}.o_proj.weight"] @ np.concatenate(parts))
    return outputs


def resampler(
    context: list[np.ndarray], weights: Weights, prefix: str, blocks: int, self_attn: int, heads: int, kv_heads: int
) -> list[np.ndarray]:
    latents = list(weights[f"{prefix}.latents_q"])
    kinds = (["cross"] + ["self"] * self_attn) * blocks
    for index, kind in enumerate(kinds):
        layer = f"{prefix}.layers.{index}"
        normed = [rms_norm(latent, weights[f"{layer}.input_latents_layernorm.weight"]) for latent in latents]
        sources = list(normed)
        if kind == "cross":
            norm = weights[f"{layer}.input_context_layernorm.weight"]
            sources = [rms_norm(token, norm) for token in context] + normed
        attended = attention(normed, sources, weights, f"{layer}.self_attn", heads, kv_heads)
        for i, output in enumerate(attended):
            latents[i] = latents[i] + rms_norm(output, weights[f"{layer}.post_attention_layernorm.weight"])
            hidden = rms_norm(latents[i], weights[f"{layer}.pre_ff_layernorm.weight"])
            hidden = gated_mlp(hidden, weights, f"{layer}.mlp")
            latents[i] = latents[i] + rms_norm(hidden, weights[f"{layer}.post_ff_layernorm.weight"])
    return [rms_norm(latent, weights[f"{prefix}.layernorm.weight"]) for latent in latents]


def generate(
    features_LTD: np.ndarray,
    real_T: np.ndarray,
    weights: Weights,
    modules: dict[str, tuple[int, int]],
    rank: int,
    blocks: int,
    self_attn: int,
    pre_head_layers: int,
    heads: int,
    kv_heads: int,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Factors of one chunk before the bias: module -> (A [L, R, d_in], B [L, R, d_out])."""
    num_layers = features_LTD.shape[0]
    names = sorted(modules)
    factors = {
        name: (np.zeros((num_layers, rank, modules[name][0])), np.zeros((num_layers, rank, modules[name][1])))
        for name in names
    }
    prefix = "aggregator.perceiver"
    for layer in range(num_layers):
        tokens = [features_LTD[layer, t] for t in range(features_LTD.shape[1]) if real_T[t]]
        context = [gated_mlp(token, weights, f"{prefix}.modality_projection") for token in tokens]
        encoded = resampler(context, weights, f"{prefix}.encoder", blocks, self_attn, heads, kv_heads)
        decoded = resampler(encoded, weights, f"{prefix}.decoder", 1, 0, heads, kv_heads)
        for m, name in enumerate(names):
            d_in, d_out = modules[name]
            for r in range(rank):
                latent = decoded[m * rank + r]
                for i in range(pre_head_layers):
                    mlp = {key: weights[f"layers.{i}.mlp.{key}"] for key in ("0.weight", "0.bias", "2.weight")}
                    mlp |= {key: weights[f"layers.{i}.mlp.{key}"] for key in ("2.bias", "5.weight", "5.bias")}
                    hidden = layer_norm(latent, mlp["0.weight"], mlp["0.bias"])
                    hidden = mlp["5.weight"] @ silu(mlp["2.weight"] @ hidden + mlp["2.bias"]) + mlp["5.bias"]
                    out = layer_norm(hidden, weights[f"layers.{i}.mlp.6.weight"], weights[f"layers.{i}.mlp.6.bias"])
                    latent = latent + out
                latent = latent / math.sqrt(float(latent @ latent))
                head = weights["head.weight"][layer] if len(names) == 1 else weights["head.weight"][layer, m]
                row = latent @ head
                factors[name][0][layer, r] = row[:d_in] * weights[f"scaler_A.{name}"][0, layer, r, 0]
                factors[name][1][layer, r] = row[d_in : d_in + d_out] * weights[f"scaler_B.{name}"][0, layer, r, 0]
    return factors


def compose(
    chunks: list[dict[str, tuple[np.ndarray, np.ndarray]]], weights: Weights
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All chunks along the rank, then the learned bias, once."""
    return {
        name: (
            np.concatenate([*(chunk[name][0] for chunk in chunks), weights[f"bias_A.{name}"]], axis=1),
            np.concatenate([*(chunk[name][1] for chunk in chunks), weights[f"bias_B.{name}"]], axis=1),
        )
        for name in chunks[0]
    }


def adapted_linear(weight_OI: np.ndarray, x_I: np.ndarray, a_RI: np.ndarray, b_RO: np.ndarray, s: float) -> np.ndarray:
    """y = W x + s * B^T (A x)."""
    return weight_OI @ x_I + s * (b_RO.T @ (a_RI @ x_I))
