"""Checks that a hypernetwork and a base model fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.hypernetwork.config import HypernetworkConfig

if TYPE_CHECKING:
    from torch import nn


def check_shapes(shapes: BaseShapes, config: HypernetworkConfig) -> None:
    """Check, by the model's configuration, that the adapters of this hypernetwork fit the model.

    Raises:
        ValueError: they do not; the message says for which model the hypernetwork was made.
    """
    found = {name: shapes.modules.get(name) for name in config.modules}
    if config.num_layers != shapes.layers or found != config.modules:
        raise ValueError(
            f"the hypernetwork was made for {config.base_model!r}, {config.num_layers} layers with "
            f"{config.modules}; this model has {shapes.layers} layers with {found}: serve that model, or name a "
            "hypernetwork for this one"
        )


def check_fit(model: nn.Module, config: HypernetworkConfig) -> None:
    """Check that a hypernetwork's features and factors have the model's sizes.

    Raises:
        ValueError: they do not; the message names both and every difference.
    """
    from f2l_vllm.base_models.text_layers import module_sizes, name_of, text_layers_of, text_model_of  # loads torch

    layers = text_layers_of(model)
    text_config: Any = text_model_of(model).config
    hidden_size = text_config.hidden_size
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
