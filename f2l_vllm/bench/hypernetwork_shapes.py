"""Random models and hypernetworks in the shapes and file formats of the released ones, for benchmarks.

Sizes are those of SmolVLM2-500M-Video-Instruct and SmolVLM2-2.2B-Instruct and of the Frames2LoRA checkpoints for them.
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

from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.model import Hypernetwork


@dataclass(frozen=True)
class Shape:
    """One released model and its hypernetwork."""

    hypernetwork: HypernetworkConfig
    text: dict[str, int]
    vision: dict[str, int]
    scale_factor: int

    @property
    def tokens_per_frame(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"] // self.scale_factor) ** 2


SHAPES = {
    "500M": Shape(
        HypernetworkConfig("SmolVLM2-500M", 32, 960, {"down_proj": (2560, 960)}, rank=16, latent_size=512),
        {
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "vocab_size": 49280,
        },
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        scale_factor=4,
    ),
    "2.2B": Shape(
        HypernetworkConfig("SmolVLM2-2.2B", 24, 2048, {"down_proj": (8192, 2048)}, rank=16, latent_size=512),
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 49280,
        },
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        scale_factor=3,
    ),
}


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
    """Write a random SmolVLM with its processor."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    from f2l_vllm.recipes.f2l_tiny import tokenizer as tokens
    from f2l_vllm.recipes.f2l_tiny.checkpoint import CHAT_TEMPLATE

    tokenizer = tokens.build_tokenizer()
    size = {"longest_edge": shape.vision["image_size"]}
    SmolVLMProcessor(
        SmolVLMImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False),
        tokenizer,
        SmolVLMVideoProcessor(size=size, max_image_size=size, num_frames=64, fps=1),
        image_seq_len=shape.tokens_per_frame,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
    ids = {"pad_token_id": tokenizer.pad_token_id}
    config = SmolVLMConfig(
        vision_config=shape.vision,
        text_config={
            "model_type": "llama",
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-5,
            **shape.text,
            **ids,
        },
        scale_factor=shape.scale_factor,
        image_token_id=tokenizer.get_vocab()[tokens.IMAGE],
        **ids,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        SmolVLMForConditionalGeneration(config).save_pretrained(directory)
    finally:
        torch.set_default_dtype(default)
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
