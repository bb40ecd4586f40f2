"""The families of base models. A new one is a module beside `smolvlm` and a line here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2l_vllm.base_models import smolvlm
from f2l_vllm.base_models.spec import BaseModelSpec
from f2l_vllm.files import read_json

if TYPE_CHECKING:
    from torch import nn

FAMILIES = {spec.name: spec for spec in (smolvlm.SPEC,)}
DEFAULT = smolvlm.SPEC  # of the released hypernetworks


def family_named(name: object, whose: str) -> BaseModelSpec:
    """The family with this `model_type`.

    Args:
        whose: the model, for the message.

    Raises:
        ValueError: there is none; the message lists the families.
    """
    spec = FAMILIES.get(str(name))
    if spec is None:
        known = ", ".join(f"{spec.name} (for example {spec.example})" for spec in FAMILIES.values())
        raise ValueError(
            f"{whose} is of the type {name!r}, and adapters are made for these: {known}; "
            "docs/base-models.md says how another one is added"
        )
    return spec


def family_in(directory: Path) -> BaseModelSpec:
    """The family of a model directory, by its `config.json`. Raises ValueError as `family_named` does."""
    config: Any = read_json(directory / "config.json")
    return family_named(config.get("model_type") if isinstance(config, dict) else None, str(directory))


def family_of(model: nn.Module) -> BaseModelSpec:
    """The family of a transformers model. Raises ValueError as `family_named` does."""
    config = getattr(model, "config", None)
    return family_named(getattr(config, "model_type", None), type(model).__name__)


def check_module(name: str) -> None:
    """Raise ValueError if no family's text layers have a target linear of that name."""
    known = list(dict.fromkeys(module for spec in FAMILIES.values() for module in spec.module_paths))
    if name not in known:
        raise ValueError(f"Unknown target module {name!r}; choose from {known}.")
