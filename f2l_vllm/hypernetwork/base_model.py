"""Where a transformers SmolVLM keeps its text layers, and their target linears."""

from __future__ import annotations

from typing import Any

from torch import nn

from f2l_vllm.hypernetwork.config import ATTENTION_MODULES, HypernetworkConfig, check_module


def text_model_of(model: nn.Module) -> nn.Module:
    """The decoder stack (embeddings, layers, norm) of a SmolVLM, with or without its language-model head.

    Raises:
        ValueError: the model has no `text_model`.
    """
    inner = getattr(model, "model", model)
    text_model = getattr(inner, "text_model", None)
    if not isinstance(text_model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no text_model with decoder layers; "
            "load a SmolVLM with AutoModelForImageTextToText.from_pretrained."
        )
    return text_model


def text_layers_of(model: nn.Module) -> nn.ModuleList:
    """The L decoder layers."""
    layers = text_model_of(model).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def module_path(name: str) -> str:
    """Path of a target linear inside a decoder layer, e.g. `mlp.down_proj`."""
    return f"self_attn.{name}" if name in ATTENTION_MODULES else f"mlp.{name}"


def target_linear(layer: nn.Module, name: str) -> nn.Linear:
    """The target linear `name` of one decoder layer."""
    linear = layer.get_submodule(module_path(name))
    assert hasattr(linear, "in_features"), f"{name} is not a linear layer"
    return linear  # type: ignore[return-value]


def name_of(model: nn.Module) -> str:
    """Name or path the model was loaded from, for messages."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def module_sizes(model: nn.Module, names: tuple[str, ...] | list[str]) -> dict[str, tuple[int, int]]:
    """`HypernetworkConfig.modules` for the given target linears of a model: name -> (d_in, d_out).

    Raises:
        ValueError: a name that is none of a target linear; the message lists those there are.
    """
    for name in names:
        check_module(name)
    layer = text_layers_of(model)[0]
    linears = {name: target_linear(layer, name) for name in sorted(names)}
    return {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}


def check_fit(model: nn.Module, config: HypernetworkConfig) -> None:
    """Check that a hypernetwork's features and factors have the model's sizes.

    Raises:
        ValueError: they do not; the message names both and every difference.
    """
    layers = text_layers_of(model)
    hidden_size = text_model_of(model).config.hidden_size  # type: ignore[union-attr]
    differences = []
    if len(layers) != config.num_layers:
        differences.append(f"{config.num_layers} text layers expected, the model has {len(layers)}")
    if hidden_size != config.feature_size:
        differences.append(f"hidden size {config.feature_size} expected, the model has {hidden_size}")
    for name, sizes in module_sizes(model, list(config.modules)).items():
        if sizes != config.modules[name]:
            differences.append(f"{name} (d_in, d_out) {config.modules[name]} expected, the model has {sizes}")
    if differences:
        raise ValueError(
            f"The hypernetwork was made for {config.base_model!r} and does not fit the model {name_of(model)!r}: "
            + "; ".join(differences)
            + f". Load {config.base_model!r}, or a hypernetwork trained for this model."
        )


def check_length(model: nn.Module, prompt_tokens: int, max_tokens: int = 0) -> None:
    """Whether a prompt and the longest answer to it are within what the model reads.

    Raises:
        ValueError: they are not; beyond it a model answers nonsense without an error.
    """
    config: Any = text_model_of(model).config
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and prompt_tokens + max_tokens > most:
        answer = f" and an answer of up to {max_tokens}" if max_tokens else ""
        raise ValueError(
            f"{name_of(model)} reads at most {most} tokens, and this is a prompt of {prompt_tokens}{answer}: "
            "ask in fewer words, take fewer frames, or allow a shorter answer"
        )
