"""Fast work on many tokens, a block at a time, so that intermediate results do not grow with the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
MIN_PACKED = 2**16  # numbers in a weight; smaller weights are not worth a packed copy


@dataclass(frozen=True)
class BlockSizes:
    """How many numbers of each kind of intermediate result a device holds at once.

    Attributes:
        hidden: hidden activations of an MLP.
        scores: attention scores.
        context: of all text layers whose contexts are read together.
    """

    hidden: int
    scores: int
    context: int


CPU = BlockSizes(hidden=2**22, scores=2**20, context=2**23)
"""16 MiB in fp32, large enough for full matmul speed; 4 MiB, which stay in the cache; 32 MiB."""
ACCELERATOR = BlockSizes(hidden=2**26, scores=2**25, context=2**27)
"""256, 128 and 512 MiB in fp32. The work of one layer is shorter there than the time in which Python launches it, so
as many layers as have room are one batch; a worker's share of a GPU has 2.5 GiB for all that it computes."""


def block_sizes(device: torch.device) -> BlockSizes:
    """The limits of this device."""
    return CPU if device.type == "cpu" else ACCELERATOR


def mlp_in_blocks(mlp: Callable[[Tensor], Tensor], x: Tensor, hidden_size: int) -> Tensor:
    """`mlp(x)` for an MLP that treats every token separately, holding the hidden activations of few tokens at a time.

    With gradients enabled the MLP runs in one go: autograd keeps all hidden activations anyway.

    Args:
        mlp: maps [..., X] to [..., Y], each token independently of the others.
        x: [..., X].
        hidden_size: hidden activations of the MLP per token.

    Returns:
        [..., Y], equal to `mlp(x)`.
    """
    tokens = max(1, block_sizes(x.device).hidden // hidden_size)
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

    On a CPU, oneDNN computes it, with the activation and the product while their inputs are in the cache. torch itself
    uses MKL for fp32, which on AMD processors leaves a sixth of the speed unused. torch's compiler emits these
    operators; they are not a public interface, and a torch without them only loses the speed.

    Args:
        x: [..., X].
        gate, up, down: weights [H, X], [H, X], [Y, H], as they are or `packed`.

    Returns:
        [..., Y].
    """
    if not _suits_onednn(gate) or x.dtype != gate.dtype:
        # In place: allocating the widest tensors takes as much time as computing them.
        return F.linear(F.silu(F.linear(x, gate), inplace=True).mul_(F.linear(x, up)), down)
    product = torch.ops.mkldnn._linear_pointwise
    no_scalars: list[float] = []
    activated = product(x, gate, None, "swish", no_scalars, "")
    return product(product.binary(x, activated, up, None, "mul"), down, None, "none", no_scalars, "")


def packed(weight: Tensor, rows: int) -> Tensor:
    """A copy of a linear's weight in oneDNN's layout for `rows` rows at a time; the weight itself if that is no use.

    oneDNN rearranges a plain weight at every call, which takes a tenth of the time of 512 rows.
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
