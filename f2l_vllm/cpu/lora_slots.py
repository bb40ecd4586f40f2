"""How the adapters of a batch lie in memory on a CPU.

vLLM gives every linear layer M slots of the largest rank R that it serves, and pads smaller adapters with zeros. Here
a slot holds its adapter at the adapter's own rank: a step reads every factor of its adapters, and padding takes as long
to read as weights.

A slot of A is a table of I rows, one for each input feature, w wide and back to back from the slot's start; w is the
least divisor of R into which the adapter's rank fits. The rest of the slot is not read. A slot of B is a table of R
rows of O, of which w are read. Both products are therefore sums of a table's rows, weighted by the input or by the
hidden values.

M slots, R largest rank, I input features, O output features, w width.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from f2l_vllm import vllm_versions

if vllm_versions.installed() == "0.32":
    from vllm.lora.layers.classifier import ClassificationHeadWithLoRA as ClassificationHead
else:  # one of two kinds
    from vllm.lora.layers.classifier import BaseClassificationHeadWithLoRA as ClassificationHead


class CompactLoRAModelManager(LRUCacheLoRAModelManager):
    """vLLM's manager of slots; packs an adapter to its rank when it puts it into a slot."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Classification heads, and layers sharded over workers, use other operations of the Punica wrapper, which read
        # a slot in vLLM's own layout.
        linears = [m for m in self.modules.values() if isinstance(m, BaseLinearLayerWithLoRA)]
        if self.lora_config.fully_sharded_loras:
            linears = []
        self._packed_linears = [m for m in linears if not isinstance(m, ClassificationHead)]
        for module in self._packed_linears:
            module.lora_a_stacked = tuple(transposed_slots(a) for a in module.lora_a_stacked)
            module.lora_b_stacked = tuple(transposed_slots(b) for b in module.lora_b_stacked)

    def activate_adapter(self, lora_id: int) -> bool:
        if not super().activate_adapter(lora_id):
            return False
        slot = self.lora_index_to_id.index(lora_id)
        rank = max((_rank(weights) for weights in self._registered_adapters[lora_id].loras.values()), default=0)
        width = row_width(rank, self.lora_config.max_lora_rank)
        for module in self._packed_linears:
            for a_M1RI in module.lora_a_stacked:
                pack_slot(a_M1RI[slot, 0], width)
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper.set_width(slot, width)
        return True


def transposed_slots(slots: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape `[M, 1, a, b]` of `slots`, stored as `[M, 1, b, a]`."""
    return slots.new_zeros(slots.transpose(2, 3).shape).transpose(2, 3)


def is_table(slots: torch.Tensor) -> bool:
    """Whether `slots` is stored as `transposed_slots` stores it."""
    return slots.stride(2) == 1


def row_width(rank: int, max_rank: int) -> int:
    """The least divisor of `max_rank` into which `rank` fits."""
    return next(width for width in range(max(rank, 1), max_rank + 1) if max_rank % width == 0)


def pack_slot(a_RI: torch.Tensor, width: int) -> None:
    """Move the first `width` of R ranks of one slot of A together, into rows of `width`. Nothing reads the slot by its
    shape afterwards."""
    table_IR = a_RI.T
    if width < table_IR.shape[1]:
        kept_IW = table_IR[:, :width].clone()
        table_IR.view(-1)[: kept_IW.numel()].view(kept_IW.shape).copy_(kept_IW)


def _rank(weights: LoRALayerWeights) -> int:
    factors = weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a]
    return max((factor.shape[0] for factor in factors if factor is not None), default=0)
