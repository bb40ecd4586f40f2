"""Work on many tokens: a block at a time, so that intermediate results do not grow with their number, and fast."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
MIN_PACKED = 2**16  # numbers in a weight from which a packed copy is worth its making
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


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`down(silu(gate x) * up x)` without gradients.

    On a CPU oneDNN computes it, the activation and the product while they are in the cache. torch itself asks MKL in
    fp32, which on AMD processors leaves a sixth of the speed unused. The operators are those that torch's compiler
    emits and are no public interface: a torch without them loses the speed, nothing else.

    Args:
        x: [..., X].
        gate, up, down: weights [H, X], [H, X], [Y, H], as they are or `packed`.

    Returns:
        [..., Y].
    """
    if not _suits_onednn(gate) or x.dtype != gate.dtype:
        # In place: fresh memory for the widest tensors costs as much time as what is computed there.
        return F.linear(F.silu(F.linear(x, gate), inplace=True).mul_(F.linear(x, up)), down)
    product = torch.ops.mkldnn._linear_pointwise
    no_scalars: list[float] = []
    activated = product(x, gate, None, "swish", no_scalars, "")
    return product(product.binary(x, activated, up, None, "mul"), down, None, "none", no_scalars, "")


def packed(weight: Tensor, rows: int) -> Tensor:
    """A copy of a linear's weight as oneDNN reads it for `rows` rows at a time; where that is no use, the weight.

    oneDNN rearranges a plain weight at every call: a tenth of the time of 512 rows.
    """
    if not _suits_onednn(weight) or weight.numel() < MIN_PACKED:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def _suits_onednn(weight: Tensor) -> bool:
    if not _HAS_ONEDNN or weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
