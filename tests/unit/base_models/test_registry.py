"""Families of base models: which there are, and what one more needs."""

import json
from dataclasses import replace

import pytest
import torch

from f2l_vllm.base_models import registry
from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.base_models.text_layers import module_sizes, target_linear, text_layers_of
from f2l_vllm.hypernetwork.adapter import Adapter
from f2l_vllm.recipes.f2l_tiny.checkpoint import CHAT_TEMPLATE
from f2l_vllm.recipes.f2l_tiny.tokenizer import build_tokenizer


class Other(torch.nn.Module):
    """A model whose decoder lies elsewhere and whose linears have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"model_type": "other"})()
        self.decoder = torch.nn.Module()
        layer = torch.nn.Module()
        layer.ffn = torch.nn.Linear(6, 4)
        self.decoder.layers = torch.nn.ModuleList([layer])


@pytest.fixture
def other(monkeypatch):
    """One more family, as a line in the registry makes it."""
    spec = replace(
        registry.DEFAULT,
        name="other",
        text_config="decoder",
        text_model="decoder",
        peft_prefix="base_model.model.decoder.layers",
        module_paths={"ffn": "ffn"},
        module_sizes=lambda text: {"ffn": (text["inner"], text["outer"])},
    )
    monkeypatch.setitem(registry.FAMILIES, "other", spec)
    return spec


def test_a_family_is_a_line_in_the_registry(other, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "other", "decoder": {"num_hidden_layers": 1, "inner": 6, "outer": 4}})
    )
    shapes = BaseShapes.read(tmp_path)
    assert (shapes.layers, shapes.modules) == (1, {"ffn": (6, 4)})
    model = Other()
    assert module_sizes(model, ["ffn"]) == shapes.modules
    assert target_linear(model, text_layers_of(model)[0], "ffn") is model.decoder.layers[0].ffn
    adapter = Adapter({"ffn": (torch.zeros(1, 2, 6), torch.zeros(1, 2, 4))}, scale=1.0)
    names = {shapes.key(0, "ffn", factor) for factor in "AB"}
    assert set(adapter.tensors(family=other)) == names
    assert min(names) == "base_model.model.decoder.layers.0.ffn.lora_A.weight"


def test_an_unknown_family_is_refused_with_those_there_are(other):
    with pytest.raises(ValueError, match=r"'qwen2_vl'.*smolvlm \(for example HuggingFaceTB/.*other"):
        registry.family_named("qwen2_vl", "that model")
    with pytest.raises(ValueError, match=r"Unknown target module 'conv'; choose from .*'down_proj'.*'ffn'"):
        registry.check_module("conv")


@pytest.mark.parametrize("family", registry.FAMILIES.values(), ids=registry.FAMILIES)
def test_a_familys_random_models_have_the_sizes_of_its_released_ones(family):
    assert family.released_sizes
    for size in family.released_sizes.values():
        with torch.device("meta"):
            processor, model = family.random_model(size, build_tokenizer(), CHAT_TEMPLATE)
        assert registry.family_of(model) is family
        assert family.recognised(model.config.to_dict()) in family.released_for
        assert processor.image_seq_len == size.tokens_per_frame
        text = {**size.text, "hidden_size": 2 * size.text["num_attention_heads"], "num_hidden_layers": 1}
        vision = {**size.vision, "hidden_size": 2 * size.vision["num_attention_heads"], "num_hidden_layers": 1}
        _, model = family.random_model(replace(size, text=text, vision=vision), build_tokenizer(), CHAT_TEMPLATE)
        edge = size.vision["image_size"]
        tokens = family.embed_frames(model, {"pixel_values": torch.ones(1, 2, 3, edge, edge)})
        assert tokens.shape == (2, size.tokens_per_frame, text["hidden_size"])
