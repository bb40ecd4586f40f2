"""Taking an adapter's updates apart is exact: the materialised matrices say so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from f2l_vllm.evaluation.diagnostics.directions import (
    decompose,
    rebuild,
    strongest,
    update_norms,
    without_layers,
    without_random,
    without_strongest,
)
from f2l_vllm.hypernetwork.adapter import Adapter

LAYERS, RANK = 3, 6


def random_adapter(rank: int = RANK) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: (
            torch.randn(LAYERS, rank, d_in, generator=generator),
            torch.randn(LAYERS, rank, d_out, generator=generator),
        )
        for name, (d_in, d_out) in {"down_proj": (24, 16), "q_proj": (16, 20)}.items()
    }
    return Adapter(factors, scale=2.5)


def materialised(adapter: Adapter) -> dict[str, Tensor]:
    """s B^T A of every module, [L, O, I]."""
    return {name: adapter.scale * b.mT @ a for name, (a, b) in adapter.factors.items()}


def assert_same_updates(one: Adapter, other: dict[str, Tensor]) -> None:
    for name, update_LOI in materialised(one).items():
        torch.testing.assert_close(update_LOI, other[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [RANK, 18])  # 18: more than the smaller side of a target linear
def test_all_directions_together_are_the_adapter(rank: int) -> None:
    adapter = random_adapter(rank)
    directions = decompose(adapter)
    assert_same_updates(rebuild(directions, strongest(rank)), materialised(adapter))
    assert_same_updates(rebuild(directions, without_strongest(0)), materialised(adapter))
    assert_same_updates(rebuild(directions, without_random(0, seed=1)), materialised(adapter))


@pytest.mark.parametrize("count", [1, 4])
def test_the_strongest_directions_are_the_truncated_svd_of_the_materialised_update(count: int) -> None:
    adapter = random_adapter()
    directions = decompose(adapter)
    kept, removed = rebuild(directions, strongest(count)), rebuild(directions, without_strongest(count))
    for name, update_LOI in materialised(adapter).items():
        u, strengths, v = torch.linalg.svd(update_LOI, full_matrices=False)
        truncated_LOI = u[..., :count] * strengths[:, None, :count] @ v[:, :count]
        torch.testing.assert_close(directions[name].strengths_LK, strengths[:, :RANK], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(materialised(kept)[name], truncated_LOI, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(materialised(removed)[name], update_LOI - truncated_LOI, rtol=1e-4, atol=1e-3)


def test_random_removal_takes_the_number_asked_for_and_other_ones_in_other_layers() -> None:
    adapter = random_adapter()
    left = materialised(rebuild(decompose(adapter), without_random(4, seed=3)))["down_proj"]
    assert torch.linalg.matrix_rank(left, rtol=1e-5).tolist() == [RANK - 4] * LAYERS
    mask_LK = without_random(4, seed=3)(torch.ones(LAYERS, RANK))
    assert len({tuple(row) for row in mask_LK.tolist()}) > 1
    assert torch.equal(mask_LK, without_random(4, seed=3)(torch.ones(LAYERS, RANK)))


def test_layers_that_are_left_out_have_no_update_and_the_others_keep_theirs() -> None:
    adapter = random_adapter()
    expected = {name: update.clone() for name, update in materialised(adapter).items()}
    for update_LOI in expected.values():
        update_LOI[1] = 0
    assert_same_updates(without_layers(adapter, {1}), expected)


def test_norms_are_those_of_the_materialised_update() -> None:
    adapter = random_adapter()
    for name, norms_L in update_norms(adapter).items():
        torch.testing.assert_close(norms_L.float(), materialised(adapter)[name].norm(dim=(-2, -1)))
    zero = Adapter({name: (a, b * 0) for name, (a, b) in adapter.factors.items()}, 2.5)
    assert all(norms_L.tolist() == [0.0] * LAYERS for norms_L in update_norms(zero).values())
