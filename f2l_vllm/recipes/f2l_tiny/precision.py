"""bf16 matrix products for the default model's training, where the CPU computes them faster than fp32 ones.

Weights, norms, the residual stream and attention stay in fp32: torch's CPU attention is slower in bf16, and its
backward pass three times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from f2l_vllm.hypernetwork.precision import has_bf16_instructions

_ATTENTION = "sdpa_fp32"


def mixed() -> AbstractContextManager[Any]:
    """Autocast to bf16 on a CPU with bf16 instructions; elsewhere fp32, because emulated bf16 is slower."""
    return torch.autocast("cpu", torch.bfloat16) if has_bf16_instructions() else nullcontext()


@contextmanager
def attention_in_fp32(model: nn.Module) -> Iterator[None]:
    """Make a transformers model attend in fp32 under `mixed` for as long as the block lasts."""
    owner: Any = model
    owner.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        owner.set_attn_implementation("sdpa")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    with torch.autocast("cpu", enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return out, None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
