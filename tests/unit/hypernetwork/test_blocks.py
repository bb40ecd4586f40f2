"""Long videos are read in blocks: the same numbers, without intermediate results that grow with their length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from f2l_vllm.hypernetwork.blocks import CPU, gated_mlp, mlp_in_blocks, packed
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.model import Hypernetwork
from tests.support.block_sizes import limit_cpu
from tests.unit.hypernetwork.test_method import SMALL, random_hypernetwork, reference_factors

SHAPES = {
    "one module": SMALL,
    "several modules and self-attention": replace(
        SMALL, modules={"v_proj": (6, 3), "down_proj": (10, 6), "gate_proj": (6, 10)}, num_self_attn_per_block=1
    ),
}
MASKS = {
    "no padding": [True] * 11,
    "padding at the end": [True] * 7 + [False] * 4,
    "blocks of nothing but padding": [False] * 5 + [True] * 2 + [False] * 3 + [True],
    "all padding": [False] * 11,
}


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation within it makes, in numbers."""

    largest = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("tokens_per_block", [1, 3, 4, 11])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_blocks_of_any_size_equal_the_literal_reference(
    config: HypernetworkConfig, mask: list[bool], tokens_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hyper = random_hypernetwork(config)
    features, mask_T = torch.randn(config.num_layers, 11, config.feature_size), torch.tensor(mask)
    hidden = 4 * config.feature_size
    scores = config.num_latents * config.num_heads
    limit_cpu(monkeypatch, hidden=tokens_per_block * hidden, scores=tokens_per_block * config.num_layers * scores)
    produced = hyper.generate(features, mask_T)
    for name, pair in reference_factors(hyper, features, mask_T).items():
        for have, want in zip(produced[name], pair, strict=True):
            np.testing.assert_allclose(have.numpy(), want, rtol=2e-5, atol=2e-5)


def test_very_large_scores_neither_overflow_nor_lose_later_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    hyper = random_hypernetwork(SMALL)
    with torch.no_grad():
        for layer in hyper.perceiver.encoder.layers:
            layer.self_attn.q_proj.weight.mul_(100.0)
    features, mask = torch.randn(2, 9, 6), torch.ones(9, dtype=torch.bool)
    limit_cpu(monkeypatch, scores=2 * 2 * 12)
    for have, want in zip(
        hyper.double().generate(features.double(), mask)["down_proj"],
        reference_factors(hyper, features, mask)["down_proj"],
        strict=True,
    ):
        np.testing.assert_allclose(have.numpy(), want, rtol=1e-8, atol=1e-8)


def test_nothing_but_the_context_grows_with_the_video() -> None:
    config = replace(SMALL, feature_size=64, latent_size=32, modules={"down_proj": (10, 64)})
    hyper = Hypernetwork(config)
    features = torch.randn(2, 30_000, 64)
    with LargestTensor() as seen:
        hyper.generate(features, torch.ones(30_000, dtype=torch.bool))
    hidden_of_a_layer, context_of_a_layer = 30_000 * 256, 30_000 * 64
    assert context_of_a_layer < CPU.hidden < hidden_of_a_layer
    assert seen.largest <= CPU.hidden


def test_an_mlp_sees_few_tokens_at_a_time_unless_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_cpu(monkeypatch, hidden=40)
    seen: list[int] = []

    def mlp(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.numel() // 3)
        return torch.cat((x, -x), dim=-1)

    x = torch.randn(2, 7, 3)
    with torch.no_grad():
        out = mlp_in_blocks(mlp, x, hidden_size=10)
    assert torch.equal(out, torch.cat((x, -x), dim=-1))
    assert seen == [4, 4, 4, 2]
    seen.clear()
    assert torch.equal(mlp_in_blocks(mlp, x, hidden_size=10), out)
    assert seen == [14]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_in_bfloat16_factors_stay_within_three_percent(kv_heads: int) -> None:
    torch.manual_seed(0)
    config = HypernetworkConfig(
        base_model="test/model",
        num_layers=2,
        feature_size=96,
        modules={"down_proj": (80, 96)},
        rank=4,
        latent_size=64,
        num_blocks=9,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=32,
    )
    hyper = Hypernetwork(config)
    with torch.no_grad():
        for name, parameter in hyper.named_parameters():
            if parameter.ndim == 2 and "latents" not in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        hyper.scaler_B["down_proj"].fill_(1.0)
    features, mask = torch.randn(2, 700, 96), torch.arange(700) < 600
    exact = hyper.generate(features, mask)["down_proj"]
    rounded = hyper.to(torch.bfloat16).generate(features, mask)["down_proj"]
    for have, want in zip(rounded, exact, strict=True):
        assert have.dtype == torch.bfloat16
        assert ((have.float() - want).norm() / want.norm()).item() < 0.03


@pytest.mark.parametrize("has_onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 1, 24), (3, 1100, 24)], ids=str)
@torch.no_grad()
def test_a_gated_mlp_is_torchs_whatever_computes_it(
    dtype: torch.dtype, shape: tuple[int, ...], has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("f2l_vllm.hypernetwork.blocks._HAS_ONEDNN", has_onednn)
    monkeypatch.setattr("f2l_vllm.hypernetwork.blocks.MIN_PACKED", 1000)
    torch.manual_seed(0)
    gate, up, down = (
        torch.randn(80, 24, dtype=dtype),
        torch.randn(80, 24, dtype=dtype),
        torch.randn(40, 80, dtype=dtype),
    )
    strided = torch.randn(*shape[:-1], 48, dtype=dtype)[..., ::2]
    for x in (strided, strided.contiguous()):
        want = F.linear(F.silu(F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double()), down.double())
        for weights in ((gate, up, down), tuple(packed(weight, 512) for weight in (gate, up, down))):
            have = gated_mlp(x, *weights)
            assert have.dtype == dtype
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            assert ((have.double() - want).norm() / want.norm()).item() < tolerance


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_large_weights_are_packed_for_a_video_and_the_parameters_stay() -> None:
    projection = Hypernetwork(replace(SMALL, feature_size=256)).perceiver
    parameters = [weight.clone() for weight in projection.modality_projection.weights()]
    gate, up, down = projection.packed_projection()
    assert gate.is_mkldnn, "1,024 by 256 is worth packing"
    assert up.is_mkldnn
    assert down is projection.modality_projection.down_proj.weight, "6 by 1,024 is not"
    for before, after in zip(parameters, projection.modality_projection.weights(), strict=True):
        assert torch.equal(before, after)
