"""Shape of a hypernetwork: what it reads, what it writes, how large it is inside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from f2l_vllm.base_models.registry import check_module

# A video is read in a user's turn that holds the frames, then this text.
INSTRUCTION = "Internalize this video for later captioning."


_MOST = 1 << 24  # larger than any real size; a reader would build what a file states before it reads weights
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class HypernetworkConfig:
    """Everything needed to build a hypernetwork, and nothing about its weights.

    Args:
        base_model: name or path of the vision-language model whose features are read and whose layers are adapted.
        num_layers: text layers L of the base model; each gets its own A and B.
        feature_size: hidden size D of the text model.
        modules: target linear -> (d_in, d_out), kept in alphabetical order.
        rank: LoRA rank R that one video (chunk) contributes.
        latent_size: width d of the latents.
        num_latents: learned queries N of the Perceiver's encoder.
        num_blocks: cross-attention layers of the encoder.
        num_self_attn_per_block: self-attention layers after each cross-attention layer.
        num_pre_head_layers: residual MLPs between the Perceiver and the head.
        num_heads: query heads of the attention inside the Perceiver.
        num_kv_heads: its heads of keys and values.
        head_dim: size of each head.
        scale: factor s on the adapter's output; 2 * rank ** 1.5 when None.
        max_frames: frames sampled of a video in training, and by default when internalized; None leaves it to the
            base model's processor.
        longest_edge: size to which frames were scaled in training, pixels; the same default.

    Raises:
        ValueError: a size cannot be built.

    Source: Frames2LoRA (arXiv 2606.04351), section 3.
    """

    base_model: str
    num_layers: int
    feature_size: int
    modules: dict[str, tuple[int, int]]
    rank: int
    latent_size: int
    num_latents: int = 8
    num_blocks: int = 9
    num_self_attn_per_block: int = 0
    num_pre_head_layers: int = 1
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 128
    scale: float | None = None
    max_frames: int | None = None
    longest_edge: int | None = None

    def __post_init__(self) -> None:
        positive = ("num_layers", "feature_size", "rank", "latent_size", "num_latents", "num_blocks")
        for name in (*positive, "num_heads", "num_kv_heads", "head_dim"):
            _require_int(name, getattr(self, name), least=1)
        for name in ("num_self_attn_per_block", "num_pre_head_layers"):
            _require_int(name, getattr(self, name), least=0)
        if self.num_blocks * (1 + self.num_self_attn_per_block) + self.num_pre_head_layers > _MOST_LAYERS:
            raise ValueError(
                f"a hypernetwork has at most {_MOST_LAYERS:,} layers; num_blocks and the like ask for more."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}), "
                "because each key/value head serves an equal group of query heads."
            )
        for name in ("max_frames", "longest_edge"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), least=1)
        object.__setattr__(self, "modules", _checked_modules(self.modules))
        scale = 2 * self.rank**1.5 if self.scale is None else float(self.scale)
        if not math.isfinite(scale) or scale <= 0:
            raise ValueError(f"scale must be a positive number, got {self.scale!r}.")
        object.__setattr__(self, "scale", scale)

    @property
    def head_size(self) -> int:
        """Entries that the head writes per rank and module: the largest d_in + d_out."""
        return max(d_in + d_out for d_in, d_out in self.modules.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of `from_dict`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"modules": {name: list(sizes) for name, sizes in self.modules.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HypernetworkConfig:
        """Build from JSON types.

        Raises:
            ValueError: a key is unknown (named in the message) or a required one is missing.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"Unknown hypernetwork config key(s) {unknown}; known keys are {known}.")
        missing = [name for name in known[: known.index("num_latents")] if name not in values]
        if missing:
            raise ValueError(f"The hypernetwork config lacks the required key(s) {missing}.")
        return cls(**values)


def _require_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
        raise ValueError(f"{name} must be an integer from {least} to {_MOST:,}, got {str(value)[:20]}.")


def _checked_modules(modules: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    if not isinstance(modules, Mapping) or not modules:
        raise ValueError("modules must name at least one target linear, e.g. {'down_proj': (2560, 960)}.")
    checked = {}
    for name, sizes in sorted(modules.items()):
        check_module(name)
        if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
            raise ValueError(f"modules[{name!r}] must be (d_in, d_out), got {sizes!r}.")
        for size in sizes:
            _require_int(f"modules[{name!r}]", size, least=1)
        checked[name] = (sizes[0], sizes[1])
    return checked
