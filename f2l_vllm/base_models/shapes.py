"""The sizes of a base model's linears, from its config alone: what an adapter has to fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from f2l_vllm.base_models.registry import DEFAULT, family_in
from f2l_vllm.base_models.spec import BaseModelSpec
from f2l_vllm.files import read_json


@dataclass(frozen=True)
class BaseShapes:
    """The text model's linears: `layers`, per module `(d_in, d_out)`, and `family`, which names them in files."""

    layers: int
    modules: dict[str, tuple[int, int]]
    family: BaseModelSpec = DEFAULT

    @classmethod
    def read(cls, model_dir: Path) -> BaseShapes:
        """From a model directory's `config.json`.

        Raises:
            ValueError: the family is unknown (the message lists the known ones), or the config lacks the sizes.
        """
        family = family_in(model_dir)
        try:
            text = read_json(model_dir / "config.json")[family.text_config]
            return cls(text["num_hidden_layers"], family.module_sizes(text), family)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{model_dir / 'config.json'} is of no whole {family.name}: {error} is missing") from error

    def key(self, layer: int, module: str, factor: str) -> str:
        """The tensor's name in PEFT files: `factor` is `A` ([rank, d_in]) or `B` ([d_out, rank])."""
        return f"{self.family.peft_prefix}.{layer}.{self.family.module_paths[module]}.lora_{factor}.weight"
