"""The sizes of a base model's linears, from its config alone: what an adapter has to fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from f2l_vllm.files import read_json
from f2l_vllm.hypernetwork.config import HypernetworkConfig


@dataclass(frozen=True)
class BaseShapes:
    """The text model's linears: `layers`, and per module `(d_in, d_out)`."""

    layers: int
    modules: dict[str, tuple[int, int]]

    @classmethod
    def read(cls, model_dir: Path) -> BaseShapes:
        """From a model directory's `config.json` (SmolVLM layout: a Llama-like `text_config`)."""
        text = read_json(model_dir / "config.json")["text_config"]
        hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
        head_dim = text.get("head_dim") or hidden // heads
        q, kv = heads * head_dim, text.get("num_key_value_heads", heads) * head_dim
        modules = {
            "q_proj": (hidden, q),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (q, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        return cls(text["num_hidden_layers"], modules)

    def check(self, config: HypernetworkConfig) -> None:
        """Whether the adapters of this hypernetwork fit the model.

        Raises:
            ValueError: they do not; the message says for which model the hypernetwork was made.
        """
        found = {name: self.modules.get(name) for name in config.modules}
        if config.num_layers != self.layers or found != config.modules:
            raise ValueError(
                f"the hypernetwork was made for {config.base_model!r}, {config.num_layers} layers with "
                f"{config.modules}; this model has {self.layers} layers with {found}: serve that model, or name a "
                "hypernetwork for this one"
            )

    def key(self, layer: int, module: str, factor: str) -> str:
        """The tensor's name in PEFT files: `factor` is `A` ([rank, d_in]) or `B` ([d_out, rank])."""
        from f2l_vllm.hypernetwork.adapter import KEY_PREFIX
        from f2l_vllm.hypernetwork.base_model import module_path

        return f"{KEY_PREFIX}.{layer}.{module_path(module)}.lora_{factor}.weight"
