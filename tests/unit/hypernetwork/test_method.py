"""The hypernetwork computes what the method says, at every shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.model import Hypernetwork
from tests.support import reference_hypernetwork as reference
from tests.support.block_sizes import limit_cpu

SMALL = HypernetworkConfig(
    base_model="test/model",
    num_layers=2,
    feature_size=6,
    modules={"down_proj": (10, 6)},
    rank=2,
    latent_size=8,
    num_latents=3,
    num_blocks=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
)
SHAPES = {
    "one module": SMALL,
    "several modules of different sizes": replace(
        SMALL, modules={"v_proj": (6, 3), "down_proj": (10, 6), "gate_proj": (6, 10)}
    ),
    "self-attention blocks": replace(SMALL, num_self_attn_per_block=2),
    "rank 5": replace(SMALL, rank=5, scale=None),
    "no pre-head layer": replace(SMALL, num_pre_head_layers=0),
    "three pre-head layers": replace(SMALL, num_pre_head_layers=3),
    "one key/value head": replace(SMALL, num_kv_heads=1),
    "as many key/value heads": replace(SMALL, num_kv_heads=4, num_latents=1),
}


def random_hypernetwork(config: HypernetworkConfig, seed: int = 0) -> Hypernetwork:
    """Every parameter away from its initial value, so that none could be left out unnoticed."""
    torch.manual_seed(seed)
    hyper = Hypernetwork(config)
    with torch.no_grad():
        for parameter in hyper.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 + 0.3 * (parameter.ndim == 1))
    return hyper


def as_numpy(hyper: Hypernetwork) -> reference.Weights:
    return {name: tensor.double().numpy() for name, tensor in hyper.state_dict().items()}


def reference_factors(hyper: Hypernetwork, features_LTD: torch.Tensor, real_T: torch.Tensor) -> dict:
    config = hyper.config
    return reference.generate(
        features_LTD.double().numpy(),
        real_T.numpy(),
        as_numpy(hyper),
        config.modules,
        config.rank,
        config.num_blocks,
        config.num_self_attn_per_block,
        config.num_pre_head_layers,
        config.num_heads,
        config.num_kv_heads,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_factors_equal_the_literal_reference_with_and_without_padding(
    config: HypernetworkConfig, dtype: torch.dtype
) -> None:
    hyper = random_hypernetwork(config)
    features = torch.randn(2, config.num_layers, 7, config.feature_size)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    produced = hyper.to(dtype)(features.to(dtype), mask)
    for row in range(2):
        expected = reference_factors(hyper, features[row], mask[row])
        for name, pair in expected.items():
            for have, want in zip(produced[name], pair, strict=True):
                tolerance = 2e-5 if dtype == torch.float32 else 1e-12
                np.testing.assert_allclose(have[row].detach().numpy(), want, rtol=tolerance, atol=tolerance)


def test_generate_equals_forward_and_ignores_padding_and_its_content() -> None:
    hyper = random_hypernetwork(SHAPES["several modules of different sizes"])
    features = torch.randn(2, 9, 6)
    mask = torch.tensor([True] * 6 + [False] * 3)
    garbage = features.clone()
    garbage[:, 6:] = 1e4
    expected = hyper.generate(features[:, :6])
    for factors in (hyper.generate(features, mask), hyper.generate(garbage, mask.long())):
        for name in expected:
            for have, want in zip(factors[name], expected[name], strict=True):
                assert not have.requires_grad
                torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projected_at_once", [1, 2, 5])
@pytest.mark.parametrize("layers_at_once", [1, 2, 3, 5])
def test_layers_read_together_or_one_by_one_give_the_same_factors(
    layers_at_once: int, projected_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In doubles, for processors add up single ones in different orders.
    hyper = random_hypernetwork(replace(SMALL, num_layers=5)).double()
    features = torch.randn(2, 5, 9, 6, dtype=torch.float64)
    mask = torch.tensor([[True] * 8 + [False], [True] * 4 + [False] * 5])
    expected = hyper(features, mask)["down_proj"]
    tokens, hidden = 2 * 9, 4 * SMALL.feature_size
    context = layers_at_once * tokens * SMALL.latent_size
    limit_cpu(monkeypatch, context=context, hidden=projected_at_once * tokens * hidden)
    read: list[int] = []
    real = hyper.perceiver.read
    monkeypatch.setattr(hyper.perceiver, "read", lambda x, mask: read.append(len(x)) or real(x, mask))
    with torch.no_grad():
        reader = hyper.reader(mask)
        for layer in range(5):
            reader.add(features[:, layer])
        produced = hyper.project(reader.latents())["down_proj"]
    assert read == {1: [2] * 5, 2: [4, 4, 2], 3: [6, 4], 5: [10]}[layers_at_once]
    for have, want in zip(produced, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12)


def test_composition_concatenates_chunks_and_appends_the_bias_once() -> None:
    hyper = random_hypernetwork(SHAPES["several modules of different sizes"])
    chunks = [hyper.generate(torch.randn(2, tokens, 6)) for tokens in (3, 5, 4)]
    expected = reference.compose(
        [{n: (a.numpy(), b.numpy()) for n, (a, b) in c.items()} for c in chunks], as_numpy(hyper)
    )
    adapter = hyper.compose(chunks)
    assert adapter.rank == 4 * hyper.config.rank
    assert adapter.scale == 2 * hyper.config.rank**1.5
    for name, pair in expected.items():
        for have, want in zip(adapter.factors[name], pair, strict=True):
            np.testing.assert_array_equal(have.numpy(), want.astype(np.float32))
    batched = hyper.combine([{n: (a[None], b[None]) for n, (a, b) in c.items()} for c in chunks])
    assert torch.equal(batched["v_proj"][1][0], adapter.factors["v_proj"][1])


def test_every_parameter_is_trained_and_factors_are_differentiable() -> None:
    hyper = random_hypernetwork(SHAPES["self-attention blocks"])
    factors = hyper(torch.randn(2, 2, 5, 6), torch.ones(2, 5))
    composed = hyper.combine([factors, factors])
    sum((a.square().sum() + b.square().sum()) for a, b in composed.values()).backward()
    untrained = [name for name, p in hyper.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert untrained == []


def test_an_untrained_hypernetwork_changes_nothing_and_has_the_papers_spread() -> None:
    torch.manual_seed(0)
    config = replace(SMALL, modules={"down_proj": (2560, 960)}, latent_size=64, rank=16, scale=None)
    hyper = Hypernetwork(config)
    a, b = hyper.compose([hyper.generate(torch.randn(2, 5, 6))]).factors["down_proj"]
    assert (b == 0).all()
    assert (a != 0).any()
    assert hyper.scale == 128.0
    assert hyper.head.weight.std().item() == pytest.approx(0.5 / (64 + 3520 * 16) ** 0.5, rel=0.02)
    assert hyper.bias_A["down_proj"].std().item() == pytest.approx(0.2 / (2560 * 16) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be an integer from 1"),
        ({"num_heads": 6, "num_kv_heads": 4}, "multiple of num_kv_heads"),
        ({"modules": {}}, "at least one target linear"),
        ({"modules": {"fc1": (2, 2)}}, "Unknown target module 'fc1'"),
        ({"modules": {"down_proj": (2, 2.5)}}, "must be an integer"),
        ({"scale": -1.0}, "scale must be a positive number"),
        ({"scale": float("nan")}, "scale must be a positive number"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_config_survives_json_and_names_unknown_and_missing_keys() -> None:
    config = replace(SMALL, modules={"up_proj": (6, 10), "down_proj": (10, 6)})
    assert list(config.modules) == ["down_proj", "up_proj"]
    assert HypernetworkConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="'depth'"):
        HypernetworkConfig.from_dict(config.to_dict() | {"depth": 3})
    with pytest.raises(ValueError, match="'rank'"):
        HypernetworkConfig.from_dict({k: v for k, v in config.to_dict().items() if k != "rank"})


def test_wrong_shapes_are_explained() -> None:
    hyper = Hypernetwork(SMALL)
    with pytest.raises(ValueError, match="expected \\[batch, 2 layers, tokens, 6\\]"):
        hyper.generate(torch.randn(3, 5, 6))
    with pytest.raises(ValueError, match="mask"):
        hyper.generate(torch.randn(2, 5, 6), torch.ones(4))
    with pytest.raises(ValueError, match="at least one chunk"):
        hyper.compose([])
    with pytest.raises(ValueError, match="cannot be composed"):
        hyper.compose([{"up_proj": (torch.zeros(2, 2, 6), torch.zeros(2, 2, 10))}])
