"""Each way of taking parts of an adapter away leaves what its name says."""

from __future__ import annotations

import pytest
import torch

from f2l_vllm.evaluation.diagnostics.ablation import (
    FIRST_LAYERS,
    INTACT,
    KEEP_STRONGEST,
    LAST_LAYERS,
    NONE,
    ONE_LAYER,
    RANK_CURVES,
    REMOVE_RANDOM,
    REMOVE_STRONGEST,
    Cut,
    cut_all,
    layer_curves,
    rank_curves,
)
from f2l_vllm.evaluation.diagnostics.directions import decompose
from f2l_vllm.hypernetwork.adapter import Adapter


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, size, generator=generator) for size in (24, 16))
    return Adapter({"down_proj": (a, b)}, scale=2.0)


@pytest.mark.parametrize(("directions", "counts"), [(16, [0, 1, 2, 4, 8, 16]), (12, [0, 1, 2, 4, 8, 12]), (1, [0, 1])])
def test_rank_curves_go_from_nothing_to_everything_in_powers_of_two(directions: int, counts: list[int]) -> None:
    curves = rank_curves(directions)
    assert set(curves) == set(RANK_CURVES)
    for name, curve in curves.items():
        assert [count for count, _ in curve] == counts
        ends = [Cut(NONE), Cut(INTACT)] if name == KEEP_STRONGEST else [Cut(INTACT), Cut(NONE)]
        assert [curve[0][1], curve[-1][1]] == ends


def test_layer_curves_leave_out_one_layer_or_grow_from_either_end() -> None:
    curves = layer_curves(3)
    left_out = {name: [(at, cut.kind, sorted(cut.layers)) for at, cut in curve] for name, curve in curves.items()}
    assert left_out[ONE_LAYER] == [(0, "layers", [0]), (1, "layers", [1]), (2, "layers", [2])]
    assert left_out[FIRST_LAYERS] == [(0, INTACT, []), (1, "layers", [0]), (2, "layers", [0, 1]), (3, NONE, [])]
    assert left_out[LAST_LAYERS] == [(0, INTACT, []), (1, "layers", [2]), (2, "layers", [1, 2]), (3, NONE, [])]


def test_cuts_leave_the_directions_and_layers_they_name(adapter: Adapter) -> None:
    cuts = {Cut(INTACT), Cut(NONE), Cut("layers", layers=frozenset({1}))}
    cuts |= {Cut(name, 3) for name in RANK_CURVES}
    left = dict(cut_all(adapter, decompose(adapter), cuts, seed=0))
    assert set(left) == cuts
    assert left[Cut(INTACT)] is adapter
    assert left[Cut(NONE)] is None
    ranks = {}
    for cut, part in left.items():
        if part is not None:
            a_LRI, b_LRO = part.factors["down_proj"]
            ranks[cut.kind] = torch.linalg.matrix_rank(part.scale * b_LRO.mT @ a_LRI, rtol=1e-5).tolist()
    assert ranks == {
        INTACT: [4, 4, 4],
        "layers": [4, 0, 4],
        KEEP_STRONGEST: [3, 3, 3],
        REMOVE_STRONGEST: [1, 1, 1],
        REMOVE_RANDOM: [1, 1, 1],
    }
