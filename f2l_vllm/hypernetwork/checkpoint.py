"""Reads the hypernetwork checkpoints released with Frames2LoRA (arXiv 2606.04351).

Such a file is `torch.save` of a flat dict: named tensors and three pickled objects of the publisher's package, which is
not needed. The tensors determine the hypernetwork's shape; everything else in the file must agree with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from f2l_vllm.hypernetwork import unpickle
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.pickled import Record

HEAD_DIM = 128  # of the Perceiver's attention in every released checkpoint; the tensors give only heads * head_dim
RELEASED_MAX_FRAMES = 12  # with which the released checkpoints were trained
RELEASED_LONGEST_EDGE = 384

_RECORDS = (
    ("ctx_to_lora.modeling.hypernet", "HypernetConfig"),
    ("ctx_to_lora.modeling.aggregator", "AggregatorConfig"),
    ("ctx_to_lora.configs", "CtxEncoderArguments"),
    ("peft.tuners.lora.config", "LoraConfig"),
    ("peft.tuners.lora.config", "LoraRuntimeConfig"),
)
_ENUMS = (("peft.utils.peft_types", "PeftType"), ("peft.utils.peft_types", "TaskType"))
# The values that this package's forward pass computes; another value means another architecture.
_SUPPORTED: dict[str, dict[str, Any]] = {
    "hypernet_config": {
        "use_light_weight_lora": False,
        "per_rank_gen": True,
        "use_per_rank_bias": False,
        "use_bias": True,
        "per_layer_processing": False,
        "use_token_mixing": False,
        "extra_modules": None,
    },
    "aggregator_config": {
        "aggregator_type": "perceiver",
        "num_extra_modules": 0,
        "shared_weights": False,
        "layer_to_layer_ctx_encoder": True,
    },
    "lora_config": {"use_rslora": False, "use_dora": False, "bias": "none"},
    "ctx_encoder_args": {"ctx_encoder_type": "per_layer_activations"},
}


def read_checkpoint(path: str | Path) -> tuple[HypernetworkConfig, dict[str, Tensor]]:
    """Read a released `.pt` file.

    Returns:
        the shape of the hypernetwork, and its tensors by released name.

    Raises:
        ValueError: not a checkpoint, damaged, holding anything unexpected, or of an unsupported architecture.
        FileNotFoundError: no such file.
    """
    return _read(path, weights=True)


def read_checkpoint_config(path: str | Path) -> HypernetworkConfig:
    """The shape of the hypernetwork in a released `.pt` file, without its weights. Raises like `read_checkpoint`."""
    return _read(path, weights=False)[0]


def _read(path: str | Path, weights: bool) -> tuple[HypernetworkConfig, dict[str, Tensor]]:
    content = unpickle.load(Path(path), _RECORDS, _ENUMS, weights)
    base_model = content.pop("base_model_name_or_path", None)
    hypernet = content.pop("hypernet_config", None)
    encoder = content.pop("ctx_encoder_args", None)
    if not isinstance(base_model, str) or not isinstance(hypernet, Record):
        raise ValueError(f"{path} is not a Frames2LoRA checkpoint: it has no hypernet_config or no base model name.")
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} holds objects that do not belong in a hypernetwork checkpoint: {others[:5]}.")
    tensors = {name.removeprefix("_orig_mod."): value for name, value in content.items()}
    try:
        return _derive_config(base_model, hypernet, encoder, tensors), tensors
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks a part of a hypernetwork checkpoint: {error!r}.") from error


def _derive_config(base_model: str, hypernet: Record, encoder: Any, tensors: dict[str, Tensor]) -> HypernetworkConfig:
    """Shape of the hypernetwork from its tensors; every other number in the file must agree."""
    aggregator, lora = hypernet["aggregator_config"], hypernet["lora_config"]
    parts = {
        "hypernet_config": hypernet,
        "aggregator_config": aggregator,
        "lora_config": lora,
        "ctx_encoder_args": encoder or {},
    }
    for part, values in _SUPPORTED.items():
        for name, supported in values.items():
            value = parts[part].get(name, supported)
            if value != supported and not (supported is None and not value):
                raise ValueError(f"The checkpoint has {part}.{name} = {value!r}; only {supported!r} can be computed.")

    perceiver = "aggregator.perceiver"
    modules = sorted(name.removeprefix("bias_A.") for name in tensors if name.startswith("bias_A."))
    if not modules:
        raise ValueError("The checkpoint has no bias_A tensors and is not a hypernetwork.")
    sizes = {name: (tensors[f"bias_A.{name}"].shape[2], tensors[f"bias_B.{name}"].shape[2]) for name in modules}
    num_layers, rank = tensors[f"bias_A.{modules[0]}"].shape[:2]
    num_latents, latent_size = tensors[f"{perceiver}.encoder.latents_q"].shape
    feature_size = tensors[f"{perceiver}.modality_projection.gate_proj.weight"].shape[1]
    attention = f"{perceiver}.decoder.layers.0.self_attn"
    depth = _count(tensors, f"{perceiver}.encoder.layers")
    cross = sum(f"{perceiver}.encoder.layers.{i}.input_context_layernorm.weight" in tensors for i in range(depth))
    if cross == 0 or depth % cross:
        raise ValueError(f"The encoder's {depth} layers with {cross} cross-attention layers do not form equal blocks.")
    scale = lora["lora_alpha"]
    if not isinstance(scale, (int, float)):
        raise ValueError(f"The checkpoint's lora_alpha is {scale!r}, not a number.")
    config = HypernetworkConfig(
        base_model=base_model,
        num_layers=num_layers,
        feature_size=feature_size,
        modules=sizes,
        rank=rank,
        latent_size=latent_size,
        num_latents=num_latents,
        num_blocks=cross,
        num_self_attn_per_block=depth // cross - 1,
        num_pre_head_layers=_count(tensors, "layers"),
        num_heads=tensors[f"{attention}.q_proj.weight"].shape[0] // HEAD_DIM,
        num_kv_heads=tensors[f"{attention}.k_proj.weight"].shape[0] // HEAD_DIM,
        head_dim=HEAD_DIM,
        scale=float(scale),
        max_frames=RELEASED_MAX_FRAMES,
        longest_edge=RELEASED_LONGEST_EDGE,
    )
    feature_sizes = hypernet["feature_sizes"]
    stated = {
        "lora_config.r": (lora["r"], rank),
        "lora_config.target_modules": (sorted(lora["target_modules"]), modules),
        "latent_size": (hypernet["latent_size"], latent_size),
        "base_hidden_size": (hypernet.get("base_hidden_size", feature_size), feature_size),
        "num_pre_head_layers": (hypernet["num_pre_head_layers"], config.num_pre_head_layers),
        "feature_sizes": ({name: tuple(part[name] for part in feature_sizes) for name in modules}, sizes),
        "layer_indices": ([int(index) for index in hypernet["layer_indices"]], list(range(num_layers))),
        "aggregator_config.num_layers": (aggregator["num_layers"], num_layers),
        "aggregator_config.num_modules": (aggregator["num_modules"], len(modules)),
        "aggregator_config.feature_size": (aggregator["feature_size"], feature_size),
        "aggregator_config.lora_r": (aggregator["lora_r"], rank),
        "aggregator_config.n_latent_queries": (aggregator["n_latent_queries"], num_latents),
        "aggregator_config.num_blocks": (aggregator["num_blocks"], config.num_blocks),
        "aggregator_config.num_self_attn_per_block": (
            aggregator["num_self_attn_per_block"],
            config.num_self_attn_per_block,
        ),
    }
    wrong = [f"{name} is {have!r}, its tensors say {want!r}" for name, (have, want) in stated.items() if have != want]
    if wrong:
        raise ValueError(f"The checkpoint contradicts itself: {'; '.join(wrong)}.")
    return config


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    indices = {name.removeprefix(f"{prefix}.").split(".")[0] for name in tensors if name.startswith(f"{prefix}.")}
    return len(indices)
