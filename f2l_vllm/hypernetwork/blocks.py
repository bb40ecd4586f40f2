"""Work on many tokens: a block at a time, so that intermediate results do not grow with their number, and fast."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HIDDEN_AT_ONCE = 2**22  # hidden activations of an MLP per block: 16 MiB in fp32, large enough for full matmul speed


def mlp_in_blocks(mlp: Callable[[Tensor], Tensor], x: Tensor, hidden_size: int) -> Tensor:
    """`mlp(x)` for an MLP that treats every token on its own, holding few tokens' hidden activations at once.

    With gradients enabled the MLP runs in one go: autograd keeps the hidden activations whatever the blocks.

    Args:
        mlp: maps [..., X] to [..., Y], each token independently of the others.
        x: [..., X].
        hidden_size: numbers the MLP holds per token in between.

    Returns:
        [..., Y], equal to `mlp(x)`.
    """
    tokens = max(1, HIDDEN_AT_ONCE // hidden_size)
    x_TX = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() or len(x_TX) <= tokens:
        return mlp(x)
    first_TY = mlp(x_TX[:tokens])
    out_TY = first_TY.new_empty(len(x_TX), first_TY.shape[-1])
    out_TY[:tokens] = first_TY
    for start in range(tokens, len(x_TX), tokens):
        out_TY[start : start + tokens] = mlp(x_TX[start : start + tokens])
    return out_TY.reshape(*x.shape[:-1], -1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` without gradients.

    In fp32 on a CPU oneDNN computes it, as it does in bf16: torch itself asks MKL there, which on AMD processors leaves
    a sixth of the speed unused. The operator is the one torch's compiler emits and is no public interface: a torch
    without it loses the speed, nothing else.
    """
    if _HAS_ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)
