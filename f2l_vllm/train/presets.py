"""Settings of `f2l-vllm train` under one name; whatever is given on the command line comes before them.

Source of the two of Frames2LoRA: the defaults of the published training scripts, compared field by field in
`docs/training.md`.
"""

from __future__ import annotations

from collections.abc import Mapping

Preset = Mapping[str, str | int | float]  # option of the command, with underscores -> value

_PAPER: Preset = {
    "micro_batch": 2,
    "accumulate": 64,
    "steps": 60_000,
    "learning_rate": 1e-4,
    "ce": 1.0,
    "kl": 0.05,
    "temperature": 1.0,
    "weigh": "answers",
    "questions": 1,
    "frames": "12",
    "longest_edge": 384,
    "chunks": "1",
    "modules": "down_proj",
    "rank": 16,
    "latent_size": 512,
    "latents": 8,
    "blocks": 9,
    "self_attention": 0,
    "precision": "bf16",
    "validate_every": 1000,
    "loader_workers": 8,
    "seed": 42,
}

PRESETS: dict[str, Preset] = {
    "paper": _PAPER,
    "paper-self-distillation": {
        **_PAPER,
        "micro_batch": 4,
        "accumulate": 4,
        "steps": 4000,
        "ce": 0.0,
        "kl": 1.0,
        "validate_every": 200,
        "loader_workers": 0,
    },
    "composable": {
        "videos": 32,
        "accumulate": 4,
        "epochs": 3.0,
        "frames": "8,12,16",
        "longest_edge": 384,
        "chunks": "1,1,2",
        "precision": "bf16",
        "validate_every": 500,
    },
}


def preset(name: str) -> Preset:
    """The settings of this name.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
