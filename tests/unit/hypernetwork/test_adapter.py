"""An adapter acts as the formula says, and its files mean the same to peft."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from f2l_vllm.base_models.text_layers import module_sizes, text_layers_of
from f2l_vllm.hypernetwork.adapter import Adapter, apply_adapter, apply_factors, compose_tensors, save_tensors
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.model import Hypernetwork
from tests.support import reference_hypernetwork as reference

PROMPT = torch.tensor([[1, 60, 70, 80, 90, 65, 75]])
MODULES = ("down_proj", "gate_proj", "q_proj", "v_proj")


@pytest.fixture(scope="module")
def model(smolvlm_dir: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(smolvlm_dir, dtype=torch.float32).eval()


def random_adapter(model: torch.nn.Module, rank: int = 5, scale: float = 3.0, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = len(text_layers_of(model))
    return Adapter(
        {
            name: (
                torch.randn(layers, rank, d_in, generator=generator) / d_in**0.5,
                torch.randn(layers, rank, d_out, generator=generator) * 0.2,
            )
            for name, (d_in, d_out) in module_sizes(model, MODULES).items()
        },
        scale=scale,
    )


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor = PROMPT) -> torch.Tensor:
    return model(ids).logits


def test_applied_adapter_is_the_formula(model: torch.nn.Module) -> None:
    adapter = random_adapter(model)
    linear = text_layers_of(model)[2].mlp.down_proj
    x = torch.randn(3, linear.in_features)
    with apply_adapter(model, adapter), torch.no_grad():
        produced = linear(x)
    a_LRI, b_LRO = adapter.factors["down_proj"]
    for row in range(3):
        expected = reference.adapted_linear(
            linear.weight.detach().double().numpy(), x[row].double().numpy(), a_LRI[2].numpy(), b_LRO[2].numpy(), 3.0
        )
        np.testing.assert_allclose(produced[row].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_adapter_acts_only_inside_the_block(model: torch.nn.Module) -> None:
    before = logits(model)
    with apply_adapter(model, random_adapter(model)):
        assert (logits(model) - before).abs().max() > 0.1
    assert torch.equal(logits(model), before)
    with pytest.raises(IndexError), apply_adapter(model, random_adapter(model)):
        logits(model, torch.tensor([[10**6]]))
    assert torch.equal(logits(model), before)


def test_factors_with_a_batch_axis_give_every_row_its_own_adapter(model: torch.nn.Module) -> None:
    first, second = random_adapter(model, seed=1), random_adapter(model, seed=2)
    batched = {
        name: tuple(torch.stack(pair) for pair in zip(first.factors[name], second.factors[name], strict=True))
        for name in first.factors
    }
    with apply_factors(model, batched, first.scale):
        both = logits(model, PROMPT.repeat(2, 1))
    for row, adapter in enumerate((first, second)):
        with apply_adapter(model, adapter):
            torch.testing.assert_close(both[row : row + 1], logits(model), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_factors_and_no_weight_of_the_model(model: torch.nn.Module) -> None:
    model.requires_grad_(False)
    adapter = random_adapter(model)
    for pair in adapter.factors.values():
        for factor in pair:
            factor.requires_grad_()
    with apply_adapter(model, adapter):
        model(PROMPT).logits.square().sum().backward()
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for pair in adapter.factors.values() for f in pair)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_peft_loads_the_export_and_gives_the_same_logits(
    model: torch.nn.Module, smolvlm_dir: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(model)
    adapter.save(tmp_path / "adapter", base_model=str(smolvlm_dir), dtype=torch.float32)
    with apply_adapter(model, adapter):
        expected = logits(model)
    fresh = AutoModelForImageTextToText.from_pretrained(smolvlm_dir, dtype=torch.float32)
    with_peft = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    assert (expected - logits(model)).abs().max() > 0.1
    torch.testing.assert_close(logits(with_peft), expected, rtol=1e-5, atol=1e-4)
    adapted = [name for name, _ in with_peft.named_modules() if name.endswith(".lora_A")]
    assert len(adapted) == len(MODULES) * len(text_layers_of(model))
    assert all("text_model" in name for name in adapted)


def test_export_has_the_keys_shapes_and_config_that_vllm_reads(model: torch.nn.Module, tmp_path: Path) -> None:
    adapter = random_adapter(model, rank=6)
    adapter.save(tmp_path / "adapter", base_model="owner/model")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.text_model.layers.1"
    down_a, down_b = adapter.factors["down_proj"]
    assert torch.equal(tensors[f"{prefix}.mlp.down_proj.lora_A.weight"], down_a[1].bfloat16())
    assert torch.equal(tensors[f"{prefix}.mlp.down_proj.lora_B.weight"], (down_b[1].T * 3.0).bfloat16())
    assert tensors[f"{prefix}.self_attn.q_proj.lora_B.weight"].shape == (64, 6)
    assert len(tensors) == 2 * len(MODULES) * adapter.num_layers
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert config["target_modules"] == sorted(MODULES)
    assert config["base_model_name_or_path"] == "owner/model"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_values_that_are_not_finite_are_refused_and_leave_nothing(
    model: torch.nn.Module, tmp_path: Path, value: float
) -> None:
    adapter = random_adapter(model)
    adapter.factors["q_proj"] = tuple(factor.double() for factor in adapter.factors["q_proj"])
    adapter.factors["q_proj"][1][3, 0, 0] = value
    with pytest.raises(ValueError, match=r"factor B of q_proj, layers \[3\]"):
        adapter.save(tmp_path / "adapter", base_model="m")
    assert list(tmp_path.iterdir()) == []


def test_saving_is_all_or_nothing_and_never_overwrites(model: torch.nn.Module, tmp_path: Path) -> None:
    adapter = random_adapter(model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # room for the configuration, not for the weights
    try:
        with pytest.raises(OSError, match="File too large"):
            adapter.save(tmp_path / "adapter", base_model="m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    adapter.save(tmp_path / "adapter", base_model="m")
    with pytest.raises(FileExistsError, match="not empty"):
        adapter.save(tmp_path / "adapter", base_model="m")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        adapter.save(tmp_path / "file", base_model="m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "file"]


def test_an_adapter_for_another_model_is_refused(model: torch.nn.Module) -> None:
    adapter = Adapter({"down_proj": (torch.zeros(4, 2, 99), torch.zeros(4, 2, 64))}, 1.0)
    with (
        pytest.raises(ValueError, match=r"\(4, 99, 64\).*made for another model"),
        apply_adapter(model, adapter),
    ):
        pass
    with pytest.raises(ValueError, match="expected \\[L, R, d_in\\]"):
        Adapter({"down_proj": (torch.zeros(4, 2, 99), torch.zeros(4, 3, 64))}, 1.0)
    with pytest.raises(ValueError, match="at least one module"):
        Adapter({}, 1.0)


def test_factors_keep_their_dtype(model: torch.nn.Module) -> None:
    adapter = random_adapter(model)
    assert adapter.factors["q_proj"][0].dtype == torch.float32
    assert adapter.to(dtype=torch.bfloat16).factors["q_proj"][0].dtype == torch.bfloat16


@pytest.fixture(scope="module")
def hypernetwork(model: torch.nn.Module) -> Hypernetwork:
    config = HypernetworkConfig(
        base_model="base",
        num_layers=len(text_layers_of(model)),
        feature_size=64,
        modules=module_sizes(model, ["down_proj", "q_proj"]),
        rank=3,
        latent_size=16,
        num_blocks=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(config)
    with torch.no_grad():
        for name in config.modules:
            hypernetwork.scaler_B[name].fill_(0.7)
            hypernetwork.bias_B[name].normal_()
    return hypernetwork


def chunks_of(hypernetwork: Hypernetwork, count: int, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    layers, size = hypernetwork.config.num_layers, hypernetwork.config.feature_size
    return [hypernetwork.generate(torch.randn(layers, 9, size, generator=generator)) for _ in range(count)]


def test_saved_adapters_compose_to_the_very_bits_the_hypernetwork_composes(hypernetwork, tmp_path):
    one, long = chunks_of(hypernetwork, 1, 1), chunks_of(hypernetwork, 3, 2)
    hypernetwork.compose(one).save(tmp_path / "one", "base")
    hypernetwork.compose(long).save(tmp_path / "long", "base")
    saved = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "long")}
    composed = compose_tensors([(saved["long"], (0, 2)), (saved["one"], (0,))], chunk_rank=3)
    hypernetwork.compose([long[0], long[2], one[0]]).save(tmp_path / "expected", "base")
    save_tensors(composed, tmp_path / "composed", "base")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "composed" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    other_order = compose_tensors([(saved["one"], (0,)), (saved["long"], (0, 2))], chunk_rank=3)
    assert any(not torch.equal(other_order[key], composed[key]) for key in composed)


def test_adapters_that_do_not_belong_together_are_not_composed(hypernetwork):
    tensors = hypernetwork.compose(chunks_of(hypernetwork, 1, 1)).tensors()
    foreign = {key: tensor.clone() for key, tensor in tensors.items()}
    next(iter(foreign.values()))[-1, -1] += 1.0
    for parts, why in (
        ([(tensors, (0,)), (foreign, (0,))], "different hypernetworks"),
        ([(tensors, (0,)), (dict(list(tensors.items())[2:]), (0,))], "different layers or modules"),
        ([(tensors, (1,))], "has 1"),
        ([(tensors, ())], "at least one chunk"),
    ):
        with pytest.raises(ValueError, match=why):
            compose_tensors(parts, chunk_rank=3)
    with pytest.raises(ValueError, match="no multiple"):
        compose_tensors([(tensors, (0,))], chunk_rank=4)
