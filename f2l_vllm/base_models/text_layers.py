"""Where a transformers model keeps its text layers, and their target linears."""

from __future__ import annotations

from typing import Any

from torch import nn

from f2l_vllm.base_models.registry import check_module, family_of


def text_model_of(model: nn.Module) -> nn.Module:
    """The decoder stack (embeddings, layers, norm), with or without the model's language-model head.

    Raises:
        ValueError: the model is of no known family, or incomplete.
    """
    family = family_of(model)
    inner = getattr(model, "model", model)
    text_model = getattr(inner, family.text_model, None)
    if not isinstance(text_model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no {family.text_model} with decoder layers; "
            f"load {family.example} or another {family.name} with AutoModelForImageTextToText.from_pretrained."
        )
    return text_model


def text_layers_of(model: nn.Module) -> nn.ModuleList:
    """The L decoder layers."""
    layers = text_model_of(model).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def target_linear(model: nn.Module, layer: nn.Module, name: str) -> nn.Linear:
    """The target linear `name` of one decoder layer of a model."""
    linear: Any = layer.get_submodule(family_of(model).module_paths[name])
    assert hasattr(linear, "in_features"), f"{name} is not a linear layer"
    found: nn.Linear = linear  # or a layer that quantization has put in its place
    return found


def name_of(model: nn.Module) -> str:
    """Name or path that the model was loaded from, for messages."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def module_sizes(model: nn.Module, names: tuple[str, ...] | list[str]) -> dict[str, tuple[int, int]]:
    """`HypernetworkConfig.modules` for the given target linears of a model: name -> (d_in, d_out).

    Raises:
        ValueError: a name is not that of a target linear; the message lists the names.
    """
    for name in names:
        check_module(name)
    layer = text_layers_of(model)[0]
    linears = {name: target_linear(model, layer, name) for name in sorted(names)}
    return {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}


def check_length(model: nn.Module, prompt_tokens: int, max_tokens: int = 0) -> None:
    """Check that a prompt and the longest answer to it fit into the model's context.

    Raises:
        ValueError: they do not; beyond its context a model answers nonsense without an error.
    """
    config: Any = text_model_of(model).config
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and prompt_tokens + max_tokens > most:
        answer = f" and an answer of up to {max_tokens}" if max_tokens else ""
        raise ValueError(
            f"{name_of(model)} reads at most {most} tokens, and this is a prompt of {prompt_tokens}{answer}: "
            "ask in fewer words, take fewer frames, or allow a shorter answer"
        )
