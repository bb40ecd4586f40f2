"""Ablation of an adapter: the ways of removing directions or layers from it, each computed once.

Shape suffixes: K directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from f2l_vllm.evaluation.diagnostics.directions import (
    Directions,
    rebuild,
    strongest,
    without_layers,
    without_random,
    without_strongest,
)
from f2l_vllm.hypernetwork.adapter import Adapter

KEEP_STRONGEST, REMOVE_STRONGEST, REMOVE_RANDOM = RANK_CURVES = (
    "keep strongest",
    "remove strongest",
    "remove random",
)
ONE_LAYER, FIRST_LAYERS, LAST_LAYERS = LAYER_CURVES = ("remove one", "remove first", "remove last")

INTACT, NONE = "intact", "none"


@dataclass(frozen=True)
class Cut:
    """A part of an adapter. `kind`: `INTACT`, `NONE`, one of `RANK_CURVES` with `count` directions, or `layers`, which
    leaves out those in `layers`."""

    kind: str
    count: int = 0
    layers: frozenset[int] = frozenset()


Curve = list[tuple[int, Cut]]


def rank_curves(directions: int) -> dict[str, Curve]:
    """Curves over numbers of directions: none, powers of two, all K."""
    counts = [2**power for power in range(directions.bit_length()) if 2**power < directions]
    curves = {name: [(count, Cut(name, count)) for count in counts] for name in RANK_CURVES}
    intact, none = Cut(INTACT), Cut(NONE)
    for name, curve in curves.items():
        first, last = (none, intact) if name == KEEP_STRONGEST else (intact, none)
        curves[name] = [(0, first), *curve, (directions, last)]
    return curves


def layer_curves(layers: int) -> dict[str, Curve]:
    """Curves over layers: each one left out (by its index), and growing numbers of them from either end."""

    def without(left_out: range) -> Cut:
        return Cut("layers", layers=frozenset(left_out)) if left_out else Cut(INTACT)

    return {
        ONE_LAYER: [(layer, without(range(layer, layer + 1))) for layer in range(layers)],
        FIRST_LAYERS: [(count, without(range(count))) for count in range(layers)] + [(layers, Cut(NONE))],
        LAST_LAYERS: [(count, without(range(layers - count, layers))) for count in range(layers)]
        + [(layers, Cut(NONE))],
    }


def cut_all(
    adapter: Adapter, directions: dict[str, Directions], cuts: set[Cut], seed: int
) -> Iterator[tuple[Cut, Adapter | None]]:
    """The part of an adapter that each cut leaves, on the adapter's device; None if it leaves nothing.

    Args:
        directions: of the adapter, as `decompose` gives them.
        seed: of the random directions.
    """
    device = next(iter(adapter.factors.values()))[0].device
    for cut in sorted(cuts, key=lambda cut: (cut.kind, cut.count, sorted(cut.layers))):
        if cut.kind == INTACT:
            yield cut, adapter
        elif cut.kind == NONE:
            yield cut, None
        elif cut.kind == "layers":
            yield cut, without_layers(adapter, set(cut.layers))
        else:
            keep = {
                KEEP_STRONGEST: strongest(cut.count),
                REMOVE_STRONGEST: without_strongest(cut.count),
                REMOVE_RANDOM: without_random(cut.count, seed),
            }[cut.kind]
            yield cut, rebuild(directions, keep).to(device)
