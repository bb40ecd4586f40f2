"""A LoRA adapter for one base model: its factors, its PEFT files, and how it acts on a transformers model.

Shape suffixes: B batch, L text layers, R rank, I/O in/out features of a target linear.

The adapted linear is y = W x + s * B^T (A x); source: Frames2LoRA (arXiv 2606.04351), section 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from f2l_vllm.base_models.registry import DEFAULT
from f2l_vllm.base_models.spec import BaseModelSpec
from f2l_vllm.base_models.text_layers import name_of, target_linear, text_layers_of
from f2l_vllm.files import atomic_directory
from f2l_vllm.store.adapter_info import AdapterInfo

Factors = dict[str, tuple[Tensor, Tensor]]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass
class Adapter:
    """LoRA factors for every text layer.

    Attributes:
        factors: module -> (A [L, R, I], B [L, R, O]), in the dtype in which they were generated.
        scale: factor s on the adapter's output, not folded into the factors.
        spans: (start, end) in seconds of the video for each chunk, in the order of their rank blocks; the last block,
            which holds the bias, has none. Empty when the whole video is one chunk.
        info: how the adapter was made; not saved.

    Raises:
        ValueError: factors whose shapes contradict each other.
    """

    factors: Factors
    scale: float
    spans: tuple[tuple[float, float], ...] = ()
    info: AdapterInfo = field(default_factory=AdapterInfo)

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("An adapter needs factors for at least one module.")
        first = next(iter(self.factors.values()))[0]
        for name, (a, b) in self.factors.items():
            if a.ndim != 3 or b.ndim != 3 or a.shape[:2] != first.shape[:2] or b.shape[:2] != first.shape[:2]:
                raise ValueError(
                    f"Factors of {name} have shapes {list(a.shape)} and {list(b.shape)}; expected [L, R, d_in] and "
                    f"[L, R, d_out] with the same L and R in every module."
                )

    @property
    def num_layers(self) -> int:
        return next(iter(self.factors.values()))[0].shape[0]

    @property
    def rank(self) -> int:
        """Total rank: (K + 1) R for K chunks, the bias included."""
        return next(iter(self.factors.values()))[0].shape[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """The same adapter on another device or in another dtype."""
        factors = {name: (a.to(device, dtype), b.to(device, dtype)) for name, (a, b) in self.factors.items()}
        return Adapter(factors, self.scale, self.spans, self.info)

    def tensors(self, dtype: torch.dtype = torch.bfloat16, family: BaseModelSpec = DEFAULT) -> dict[str, Tensor]:
        """PEFT's tensors: `lora_A` [R, I] and `lora_B` [O, R] per layer, with the scale folded into B.

        Raises:
            ValueError: a factor is not finite, or not in `dtype`.
        """
        tensors = {}
        for name, (a_LRI, b_LRO) in self.factors.items():
            a_cpu = a_LRI.detach().to("cpu", dtype)
            b_cpu = (b_LRO.detach().to("cpu", torch.float32) * self.scale).to(dtype)
            for letter, factor in (("A", a_cpu), ("B", b_cpu)):
                broken = (~factor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
                if broken:
                    raise ValueError(
                        f"The adapter is not finite (factor {letter} of {name}, layers {broken[:8]}) and was not "
                        "saved; it would break every answer. Check the video and the hypernetwork's weights."
                    )
            for layer in range(self.num_layers):
                key = f"{family.peft_prefix}.{layer}.{family.module_paths[name]}"
                tensors[f"{key}.lora_A.weight"] = a_cpu[layer].contiguous()
                tensors[f"{key}.lora_B.weight"] = b_cpu[layer].T.contiguous()
        return tensors

    def save(
        self,
        directory: str | Path,
        base_model: str,
        dtype: torch.dtype = torch.bfloat16,
        family: BaseModelSpec = DEFAULT,
    ) -> None:
        """Write a PEFT adapter that vLLM and `peft` load as it is, both files or neither.

        Args:
            directory: must be new or empty.
            base_model: name recorded for whoever loads the adapter.
            dtype: dtype of the tensors.
            family: of the base model; it determines the tensors' names.

        Raises:
            FileExistsError: the directory is not empty.
            ValueError: a factor is not finite.
        """
        save_tensors(self.tensors(dtype, family), directory, base_model)


def save_tensors(tensors: Mapping[str, Tensor], directory: str | Path, base_model: str) -> None:
    """Write PEFT tensors, with the scale folded in, like `Adapter.save`. Raises FileExistsError like it."""
    rank = next(tensor.shape[0] for key, tensor in tensors.items() if _is_a(key))
    modules = sorted({key.split(".")[-3] for key in tensors})
    config = peft_config(rank, modules, base_model)
    with atomic_directory(directory) as staging:
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # safetensors' own writer reports a full disk only in its message; this raises the system's error.
        (staging / WEIGHTS_FILE).write_bytes(save(dict(tensors), metadata={"format": "pt"}))


def compose_tensors(parts: Sequence[tuple[Mapping[str, Tensor], Sequence[int]]], chunk_rank: int) -> dict[str, Tensor]:
    """Compose saved adapters in rank space: the chosen chunks in the order named, then the bias once.

    Equal, bit for bit, to `Adapter.tensors` of the adapter that the hypernetwork composes from the same chunks.

    Args:
        parts: PEFT tensors of an adapter of rank (K + 1) R, and which of its K chunks to take.
        chunk_rank: R.

    Returns:
        PEFT tensors of rank (chunks + 1) R.

    Raises:
        ValueError: no chunk, a chunk that an adapter does not have, or adapters of different hypernetworks.
    """
    if not any(chunks for _, chunks in parts):
        raise ValueError("There is nothing to compose: choose at least one chunk.")
    first = parts[0][0]
    composed = {}
    for key in first:
        axis = 0 if _is_a(key) else 1
        pieces, bias = [], None
        for tensors, chunks in parts:
            if tensors.keys() != first.keys():
                raise ValueError("Adapters with different layers or modules cannot be composed.")
            if tensors[key].shape[axis] % chunk_rank:
                raise ValueError(f"{key} has rank {tensors[key].shape[axis]}, no multiple of a chunk's {chunk_rank}.")
            *blocks, own_bias = tensors[key].split(chunk_rank, dim=axis)
            if bias is not None and not torch.equal(own_bias, bias):
                raise ValueError("Adapters of different hypernetworks cannot be composed: their biases differ.")
            if not set(chunks) <= set(range(len(blocks))):
                raise ValueError(f"Chunks {list(chunks)} were asked for, and the adapter has {len(blocks)}.")
            bias = own_bias
            pieces += [blocks[chunk] for chunk in chunks]
        assert bias is not None
        composed[key] = torch.cat([*pieces, bias], dim=axis).contiguous()
    return composed


def apart(one: Adapter, other: Adapter) -> float:
    """How far two adapters are apart, as a part of what the first adds to the weights of all layers."""

    def inner(first: Adapter, second: Adapter) -> float:
        # <B^T A, D^T C> is the sum of (A C^T) * (B D^T): matrices of the ranks' sizes only.
        found = 0.0
        for name, (a_LRI, b_LRO) in first.factors.items():
            c_LRI, d_LRO = (factor.detach().double().cpu() for factor in second.factors[name])
            a_LRI, b_LRO = a_LRI.detach().double().cpu(), b_LRO.detach().double().cpu()
            found += float(((a_LRI @ c_LRI.mT) * (b_LRO @ d_LRO.mT)).sum())
        return first.scale * second.scale * found

    own = inner(one, one)
    return (max(0.0, own + inner(other, other) - 2 * inner(one, other)) / own) ** 0.5


def _is_a(key: str) -> bool:
    return key.endswith(".lora_A.weight")


def peft_config(rank: int, modules: list[str], base_model: str) -> dict[str, Any]:
    """`adapter_config.json`. lora_alpha equals r, so that alpha / r is 1 and a loader need not scale B."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": modules,
        "exclude_modules": ".*vision_model.*",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def named_for(config: str, base_model: str) -> str:
    """The text of an `adapter_config.json` with another name for the base model."""
    return json.dumps(json.loads(config) | {"base_model_name_or_path": base_model}, indent=2) + "\n"


@contextmanager
def apply_adapter(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Within the block, a transformers model computes with the adapter. Raises like `apply_factors`."""
    with apply_factors(model, adapter.factors, adapter.scale):
        yield


@contextmanager
def apply_factors(model: nn.Module, factors: Factors, scale: float) -> Iterator[None]:
    """Within the block, add s * B^T (A x) to every target linear; differentiable in the factors.

    Args:
        model: of a known family.
        factors: module -> (A [L, R, I], B [L, R, O]), or with a batch axis in front: one adapter per batch row.
        scale: factor s.

    Raises:
        ValueError: the factors do not have the model's sizes.
    """
    layers = text_layers_of(model)
    with ExitStack() as hooks:
        for name, (a, b) in factors.items():
            linears = [target_linear(model, layer, name) for layer in layers]
            found = (len(linears), linears[0].in_features, linears[0].out_features)
            if (a.shape[-3], a.shape[-1], b.shape[-1]) != found:
                raise ValueError(
                    f"The adapter's {name} is for (layers, d_in, d_out) = {(a.shape[-3], a.shape[-1], b.shape[-1])}, "
                    f"but {name_of(model)!r} has {found}: it was made for another model."
                )
            for index, linear in enumerate(linears):
                hook = _lora_hook(a.select(-3, index), b.select(-3, index), scale)
                hooks.callback(linear.register_forward_hook(hook).remove)
        yield


def _lora_hook(a_RI: Tensor, b_RO: Tensor, scale: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add_lora(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(a_RI.dtype)
        return output + ((x @ a_RI.mT * scale) @ b_RO).to(output.dtype)

    return add_lora
