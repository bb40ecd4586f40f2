"""Holds adapters in vLLM's workers: replaces vLLM's `LRUCacheWorkerLoRAManager`, and builds on its internals.

There are three differences. A step looks up each of its adapters directly; the stock manager copies its whole registry
for each. The host tier drops nothing by itself: `residency`, which knows the requests, decides. A load reads the file
once into one block of memory of its own (pinned if there is an accelerator), and the factors are views of that block.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import AdapterLRUCache
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.torch_utils import PIN_MEMORY

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit


@dataclass(frozen=True)
class _Factor:
    """One of a linear's two factors; `start` is its first element in the file's block."""

    module: str
    is_a: bool
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Layout:
    """Where the factors lie, in all files with the same header."""

    dtype: torch.dtype
    bytes: int
    factors: tuple[_Factor, ...]
    modules: dict[str, tuple[int, int, float]]  # module -> rank, alpha, scaling
    rank: int


class HostTierLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's manager of adapters in a worker, with the three differences of this module."""

    def __init__(self, vllm_config: Any, device: torch.device, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, device, *args, **kwargs)
        self._is_whole_model = vllm_config.parallel_config.pipeline_parallel_size == 1
        # Adapters of one model and rank share their config and header, so these are parsed and checked once.
        self._layout = lru_cache(maxsize=32)(self._read_layout)

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: Any) -> Any:
        wrapped = super().create_lora_manager(model, vllm_config)
        manager = self._adapter_manager
        manager._registered_adapters = AdapterLRUCache(math.inf, manager.deactivate_adapter)
        self._targets = set(manager.modules).union(*manager.packed_modules.values())
        return wrapped

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Load an adapter into host memory; a step that uses it takes a slot. Raises like `_load_adapter`."""
        manager = self._adapter_manager
        if lora_request.lora_int_id not in manager._registered_adapters or lora_request.load_inplace:
            with gpu_sync_allowed():
                lora = self._load_adapter(lora_request)
                manager.remove_adapter(lora.id)
                manager.add_adapter(lora)
        return True

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        manager = self._adapter_manager
        if len(lora_requests) > manager.lora_slots:
            raise RuntimeError(f"{len(lora_requests)} adapters in a step, and {manager.lora_slots} slots")
        active, absent = manager._active_adapters, []
        for request in lora_requests:
            if request.lora_int_id in active:
                active.touch(request.lora_int_id)  # so that no absent adapter takes its slot
            else:
                absent.append(request)
        for request in absent:
            if request.lora_int_id not in manager._registered_adapters:
                self.add_adapter(request)
            with gpu_sync_allowed():
                manager.activate_adapter(request.lora_int_id)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """Read an adapter's files.

        Raises:
            ValueError: they are damaged, do not fit this engine, or would attach to nothing, which would silently give
                the base model's answers.
            LoRAAdapterNotFoundError: there are none.
        """
        lora = self._load_packed(lora_request) or super()._load_adapter(lora_request)
        attaches = lora.modules_to_save or self._adapter_manager.is_pooling_model or not self._is_whole_model
        if not attaches and not any(map(partial(self._adapter_manager._get_lora_layer_weights, lora), self._targets)):
            found = sorted({name.rsplit(".", 1)[-1] for name in lora.loras})
            raise ValueError(
                f"adapter {lora_request.lora_name!r} changes nothing that this engine adapts (it has {found}): check "
                "its tensors' names, and --lora-target-modules"
            )
        return lora

    def _load_packed(self, lora_request: LoRARequest) -> LoRAModel | None:
        """A plain adapter (two factors of one dtype per linear, nothing else) in one read; None for any other."""
        directory = Path(lora_request.lora_path)
        config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
        if (
            not directory.is_absolute()
            or self._adapter_manager._is_moe
            or not weights.is_file()
            or not config.is_file()
        ):
            return None
        with weights.open("rb", buffering=0) as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > _MAX_HEADER_BYTES:
                return None
            layout = self._layout(config.read_bytes(), stream.read(size))
            if layout is None:
                return None
            held = os.fstat(stream.fileno()).st_size - 8 - size
            if held != layout.bytes:
                raise ValueError(f"{weights} is damaged: {held} bytes of tensors, and its header says {layout.bytes}")
            dtype = self.lora_config.lora_dtype
            block = torch.empty(layout.bytes, dtype=torch.uint8, pin_memory=PIN_MEMORY and dtype is layout.dtype)
            _fill(memoryview(block.numpy()), stream, weights)
        values = block.view(layout.dtype).to(dtype)
        if PIN_MEMORY and not values.is_pinned():
            values = values.pin_memory()
        loras = {
            module: LoRALayerWeights(module, rank, alpha, None, None, scaling)
            for module, (rank, alpha, scaling) in layout.modules.items()
        }
        for factor in layout.factors:
            tensor = values[factor.start : factor.start + math.prod(factor.shape)].view(factor.shape)
            setattr(loras[factor.module], "lora_a" if factor.is_a else "lora_b", tensor)
        return LoRAModel(lora_request.lora_int_id, layout.rank, loras)

    def _read_layout(self, config: bytes, header: bytes) -> _Layout | None:
        """None for files that only the stock loader can read, or has an error message for."""
        manager = self._adapter_manager
        try:
            tensors = json.loads(header)
            helper = PEFTHelper.from_dict(json.loads(config))
        except (ValueError, TypeError):
            return None
        tensors.pop("__metadata__", None)
        dtypes = {tensor["dtype"] for tensor in tensors.values()}
        special = helper.modules_to_save or helper.rank_pattern or helper.alpha_pattern
        if special or getattr(manager.model, "lora_skip_prefixes", None):
            return None
        if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
            return None
        helper.validate_legal(self.lora_config)
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        mapper = mapper.get_rename_mapper() if mapper is not None else None
        expected = set(manager.supported_lora_modules).union(*manager.packed_modules_mapping.values())
        dtype = _DTYPES[dtypes.pop()]
        factors, halves = [], set()
        for name, tensor in tensors.items():
            if not name.endswith((".lora_A.weight", ".lora_B.weight")):
                return None
            module, is_a = parse_fine_tuned_lora_name(name, mapper)
            if module.rsplit(".", 1)[-1] not in expected:
                return None
            begin, end = tensor["data_offsets"]
            shape = tuple(tensor["shape"])
            if begin % dtype.itemsize or end - begin != math.prod(shape) * dtype.itemsize:
                return None
            halves.add((module, is_a))
            factors.append(_Factor(module, is_a, begin // dtype.itemsize, shape))
        modules = {factor.module for factor in factors}
        if len(halves) != len(factors) or len(factors) != 2 * len(modules):
            return None
        ranked = dict.fromkeys(modules, (helper.r, helper.lora_alpha, helper.vllm_lora_scaling_factor))
        length = max(factor.start + math.prod(factor.shape) for factor in factors) * dtype.itemsize
        return _Layout(dtype, length, tuple(factors), ranked, helper.r)


def _fill(block: memoryview, stream: Any, path: Path) -> None:
    filled = 0
    while filled < len(block):
        count = stream.readinto(block[filled:])
        if not count:
            raise ValueError(f"{path} became shorter while it was read")
        filled += count
