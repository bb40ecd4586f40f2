"""Linear layers whose weights are stored in the layout that oneDNN reads.

`F.linear` rearranges a plain weight, or reads it across its rows, at every call; in a decoding step, which reads every
weight once for a few rows, that takes most of the time. vLLM's compiled CPU build packs its weights at load; here the
operators of PyTorch's compiler reach the same library. On a processor with AVX-512 bf16, a packed weight of
`[5120, 960]` takes 0.28 ms instead of 0.58 for one row of bf16, 0.37 instead of 0.63 for 8, and 0.6 instead of 2.4 for
two rows of fp32; with a thousand rows bf16 takes as long as unpacked, fp32 a third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm.model_executor.layers.utils as layer_utils
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

MIN_ELEMENTS = 1 << 16
"""A call with a packed weight has a fixed cost of some 15 microseconds; smaller weights do not save that much."""
_ROWS = 64  # oneDNN chooses the layout for this many rows: enough to be efficient, and as good for one


def pack_linears(model: torch.nn.Module) -> int:
    """Pack the plain linear layers of `model`, and its LM head, one after the other; return how many.

    A linear layer's own weight is freed, as vLLM does on a CPU. An LM head's stays: it may also be the embedding.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    packed = 0
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        is_linear = isinstance(layer, LinearBase) and isinstance(method, UnquantizedLinearMethod)
        is_head = isinstance(layer, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod)
        if (is_linear or is_head) and _is_packable(layer.weight):
            layer.cpu_linear = _packed(layer.weight.data)
            if is_linear:
                layer.weight = torch.nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
            packed += 1
    return packed


@contextmanager
def plainly_loaded() -> Iterator[None]:
    """Keep weights that are loaded within the block plain.

    On a processor with AMX, vLLM packs small bf16 weights with an operator that only its compiled CPU build has.
    """
    stock = layer_utils.check_cpu_sgl_kernel
    layer_utils.check_cpu_sgl_kernel = lambda *_: False
    try:
        yield
    finally:
        layer_utils.check_cpu_sgl_kernel = stock


def _is_packable(weight: torch.Tensor) -> bool:
    if weight.dtype is torch.bfloat16:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        fast = weight.dtype is torch.float32
    return fast and weight.ndim == 2 and weight.device.type == "cpu" and weight.numel() >= MIN_ELEMENTS


def _packed(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A function of input, (unused) weight and bias: the signature that vLLM calls."""
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    product = torch.ops.mkldnn._linear_pointwise.default
    no_scalars: list[Any] = []

    def linear(x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return product(x, weight, bias, "none", no_scalars, "")

    return linear
