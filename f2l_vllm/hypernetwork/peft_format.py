"""Reads PEFT adapter directories and checks them against the base model that they claim to fit.

vLLM loads an adapter whose keys lack one `model.` without an error and attaches it to nothing: every answer then
silently comes from the base model. Keys, shapes, rank and scale are therefore checked before an adapter is published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.files import read_json
from f2l_vllm.hypernetwork.adapter import CONFIG_FILE, WEIGHTS_FILE
from f2l_vllm.hypernetwork.ranks import advice


class AdapterError(ValueError):
    """An adapter directory that must not be served, and why."""


@dataclass(frozen=True)
class AdapterFiles:
    """The content of a checked adapter directory; `sha256` is of the files as the check read them."""

    rank: int
    modules: tuple[str, ...]
    bytes: int
    sha256: Mapping[str, str] = field(default_factory=dict)


def validate_adapter(directory: Path, shapes: BaseShapes, *, max_rank: int | None = None) -> AdapterFiles:
    """Check one adapter directory; return its rank, target modules and size in bytes.

    Raises:
        AdapterError: a missing or unreadable file, a key that would attach to nothing, a wrong shape or dtype, a rank
            or scale that contradicts the tensors, a rank above `max_rank`, or a value that is not finite.
    """
    try:
        config = read_json(directory / CONFIG_FILE)
        rank, alpha, targets = int(config["r"]), config["lora_alpha"], config["target_modules"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(targets, list):
        raise AdapterError(f"target_modules must be a list of module names, got {targets!r}")
    modules = tuple(sorted(targets))
    if alpha != rank:
        raise AdapterError(f"lora_alpha is {alpha} but r is {rank}: the scale must be folded into B")
    if max_rank is not None and rank > max_rank:
        raise AdapterError(f"rank {rank} is above the server's {max_rank}: {advice(rank)}")
    unknown = sorted(set(modules) - set(shapes.modules))
    if unknown or not modules:
        raise AdapterError(f"target modules {unknown or '(none)'} are not linears of this base model")
    expected: dict[str, tuple[int, int]] = {}
    for layer in range(shapes.layers):
        for module in modules:
            d_in, d_out = shapes.modules[module]
            expected[shapes.key(layer, module, "A")] = (rank, d_in)
            expected[shapes.key(layer, module, "B")] = (d_out, rank)
    path = directory / WEIGHTS_FILE
    try:
        content = path.read_bytes()
        weights = load(content)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{WEIGHTS_FILE} cannot be read: {error}") from error
    if weights.keys() != expected.keys():
        extra, missing = sorted(weights.keys() - expected.keys()), sorted(expected.keys() - weights.keys())
        raise AdapterError(f"unexpected keys {extra[:3]}, missing keys {missing[:3]}")
    for name, shape in expected.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype is not torch.bfloat16:
            raise AdapterError(f"{name} is {tensor.dtype}; published adapters are bfloat16")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name} holds a value that is not finite")
    return AdapterFiles(rank, modules, len(content), {WEIGHTS_FILE: hashlib.sha256(content).hexdigest()})
