"""Random models and hypernetworks in the shapes and file formats of the released ones, for benchmarks.

Sizes are those of the base models that the Frames2LoRA checkpoints are for, and of these.
Tokenizer and template are the default model's: a frame has the released models' number of tokens plus the words around
it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from f2l_vllm.base_models.registry import DEFAULT
from f2l_vllm.base_models.spec import ReleasedSize
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.model import Hypernetwork


@dataclass(frozen=True)
class Shape:
    """One released model and its hypernetwork."""

    hypernetwork: HypernetworkConfig
    model: ReleasedSize


def _hypernetwork(model: ReleasedSize) -> HypernetworkConfig:
    text = model.text
    sizes = {"down_proj": DEFAULT.module_sizes(text)["down_proj"]}
    return HypernetworkConfig(
        model.name, text["num_hidden_layers"], text["hidden_size"], sizes, rank=16, latent_size=512
    )


SHAPES = {name: Shape(_hypernetwork(model), model) for name, model in DEFAULT.released_sizes.items()}


def random_hypernetwork(config: HypernetworkConfig, dtype: torch.dtype = torch.float32) -> Hypernetwork:
    """A hypernetwork in which every part affects the outcome."""
    torch.manual_seed(0)
    hyper = Hypernetwork(config)
    with torch.no_grad():
        for name, parameter in hyper.named_parameters():
            if parameter.ndim == 2 and "latents" not in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        for scaler in hyper.scaler_B.parameters():
            scaler.fill_(1.0)
    return hyper.to(dtype).requires_grad_(False)


def save_model(shape: Shape, directory: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random model with its processor."""
    from f2l_vllm.recipes.f2l_tiny import tokenizer
    from f2l_vllm.recipes.f2l_tiny.checkpoint import CHAT_TEMPLATE

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        parts: Any = DEFAULT.random_model(shape.model, tokenizer.build_tokenizer(), CHAT_TEMPLATE)
    finally:
        torch.set_default_dtype(default)
    for part in parts:
        part.save_pretrained(directory)
    return directory


def save_released(hyper: Hypernetwork, path: Path) -> Path:
    """Write a hypernetwork as the publisher's code does: `torch.save` of tensors and of its own config objects."""
    from peft import LoraConfig

    config = hyper.config
    sizes = config.modules
    scale: Any = hyper.scale  # a float, as the publisher writes it; peft declares int and accepts it
    lora = LoraConfig(r=config.rank, lora_alpha=scale, target_modules=list(sizes), task_type="CAUSAL_LM")
    with _publishers_classes() as make:
        aggregator = make(
            "AggregatorConfig",
            aggregator_type="perceiver",
            num_layers=config.num_layers,
            num_modules=len(sizes),
            num_extra_modules=0,
            feature_size=config.feature_size,
            lora_r=config.rank,
            n_latent_queries=config.num_latents,
            num_blocks=config.num_blocks,
            num_self_attn_per_block=config.num_self_attn_per_block,
            shared_weights=False,
            layer_to_layer_ctx_encoder=True,
        )
        hypernet = make(
            "HypernetConfig",
            latent_size=config.latent_size,
            use_light_weight_lora=False,
            per_rank_gen=True,
            use_per_rank_bias=False,
            use_bias=True,
            per_layer_processing=False,
            use_token_mixing=False,
            num_pre_head_layers=config.num_pre_head_layers,
            lora_config=lora,
            extra_modules=None,
            base_hidden_size=config.feature_size,
            layer_indices=torch.arange(config.num_layers),
            feature_sizes=({n: i for n, (i, _) in sizes.items()}, {n: o for n, (_, o) in sizes.items()}),
            aggregator_config=aggregator,
        )
        encoder = make("CtxEncoderArguments", ctx_encoder_type="per_layer_activations", layer_idx=None)
        content = dict(hyper.state_dict()) | {
            "base_model_name_or_path": config.base_model,
            "hypernet_config": hypernet,
            "ctx_encoder_args": encoder,
        }
        torch.save(content, path)
    return path


_PUBLISHERS = {
    "HypernetConfig": "ctx_to_lora.modeling.hypernet",
    "AggregatorConfig": "ctx_to_lora.modeling.aggregator",
    "CtxEncoderArguments": "ctx_to_lora.configs",
}


@contextmanager
def _publishers_classes() -> Iterator[Any]:
    """Stand-ins for the publisher's classes, under their names: a pickle keeps no more of a class than its name."""
    classes: dict[str, type] = {}
    before = set(sys.modules)
    try:
        for package in ("ctx_to_lora", "ctx_to_lora.modeling", *_PUBLISHERS.values()):
            sys.modules[package] = ModuleType(package)
        for name, module in _PUBLISHERS.items():
            classes[name] = type(name, (), {"__module__": module})
            setattr(sys.modules[module], name, classes[name])

        def make(name: str, **attributes: Any) -> Any:
            instance = classes[name]()
            vars(instance).update(attributes)
            return instance

        yield make
    finally:
        for module in set(sys.modules) - before:
            if module.startswith("ctx_to_lora"):
                del sys.modules[module]
