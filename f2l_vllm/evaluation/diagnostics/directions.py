"""An adapter's update of each layer as directions in order of strength, and its size, without building full matrices.

The update s B^T A of a target linear is O x I, but its rank is at most R: with A^T = Q_A R_A and B^T = Q_B R_B, its
singular values are those of the R x R core s R_B R_A^T.

Shape suffixes: L text layers, R rank, I/O in/out features of a target linear, K directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from f2l_vllm.base_models.text_layers import target_linear, text_layers_of
from f2l_vllm.hypernetwork.adapter import Adapter


@dataclass(frozen=True)
class Directions:
    """The update of one target linear in every layer: sum over k of strength_k * out_k in_k^T.

    Attributes:
        out_LKO: orthonormal directions of the output.
        strengths_LK: singular values, largest first.
        in_LKI: orthonormal directions of the input.
    """

    out_LKO: Tensor
    strengths_LK: Tensor
    in_LKI: Tensor


def decompose(adapter: Adapter) -> dict[str, Directions]:
    """Singular directions of every module's update, including the scale s: computed in fp64, returned in fp32 on the
    CPU."""
    found = {}
    for name, (a_LRI, b_LRO) in adapter.factors.items():
        q_in_LIK, r_in_LKR = torch.linalg.qr(a_LRI.cpu().double().mT)
        q_out_LOK, r_out_LKR = torch.linalg.qr(b_LRO.cpu().double().mT)
        u_LKK, strengths_LK, v_LKK = torch.linalg.svd(adapter.scale * r_out_LKR @ r_in_LKR.mT, full_matrices=False)
        found[name] = Directions((q_out_LOK @ u_LKK).mT.float(), strengths_LK.float(), (v_LKK @ q_in_LIK.mT).float())
    return found


def rebuild(directions: dict[str, Directions], keep: Callable[[Tensor], Tensor]) -> Adapter:
    """The adapter that is left with the kept directions.

    Args:
        keep: maps a module's strengths [L, K] to a bool mask [L, K], True for directions to keep.
    """
    factors = {}
    for name, found in directions.items():
        kept_LK1 = (found.strengths_LK * keep(found.strengths_LK))[..., None]
        factors[name] = (found.in_LKI * kept_LK1, found.out_LKO * (kept_LK1 != 0))
    return Adapter(factors, scale=1.0)


def strongest(count: int) -> Callable[[Tensor], Tensor]:
    """Mask of the `count` strongest directions of every layer."""
    return lambda strengths_LK: torch.arange(strengths_LK.shape[1]).expand_as(strengths_LK) < count


def without_strongest(count: int) -> Callable[[Tensor], Tensor]:
    """Mask of all but the `count` strongest directions of every layer."""
    return lambda strengths_LK: ~strongest(count)(strengths_LK)


def without_random(count: int, seed: int) -> Callable[[Tensor], Tensor]:
    """Mask of all but `count` directions of every layer, drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda strengths_LK: torch.rand(strengths_LK.shape, generator=generator).argsort(-1) >= count


def without_layers(adapter: Adapter, layers: set[int]) -> Adapter:
    """The adapter whose updates of these layers are zero."""
    kept_L11 = torch.tensor([layer not in layers for layer in range(adapter.num_layers)])[:, None, None]
    factors = {name: (a, b * kept_L11.to(b.device)) for name, (a, b) in adapter.factors.items()}
    return Adapter(factors, adapter.scale)


def update_norms(adapter: Adapter) -> dict[str, Tensor]:
    """Frobenius norm of s B^T A of every module and layer, [L] in fp64, from the R x R Gram matrices of A and B."""
    norms = {}
    for name, (a_LRI, b_LRO) in adapter.factors.items():
        a64, b64 = a_LRI.double(), b_LRO.double()
        squares_L = ((a64 @ a64.mT) * (b64 @ b64.mT)).sum((-2, -1))
        norms[name] = adapter.scale * squares_L.clamp(min=0).sqrt()
    return norms


def weight_norms(model: nn.Module, modules: list[str]) -> dict[str, Tensor]:
    """Frobenius norm of the frozen weight of every target linear, [L] in fp64."""
    layers = text_layers_of(model)
    return {
        name: torch.stack([target_linear(model, layer, name).weight.detach().double().norm() for layer in layers])
        for name in modules
    }
