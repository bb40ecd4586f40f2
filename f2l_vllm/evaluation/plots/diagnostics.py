"""Pictures of the diagnostics: directions and layers removed, the updates' sizes, and what they add to the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from f2l_vllm.evaluation.diagnostics.ablation import (
    FIRST_LAYERS,
    KEEP_STRONGEST,
    LAST_LAYERS,
    ONE_LAYER,
    REMOVE_RANDOM,
    REMOVE_STRONGEST,
)
from f2l_vllm.evaluation.plots import style

Point = dict[str, Any]

_NAMES = {
    KEEP_STRONGEST: "only the k strongest",
    REMOVE_STRONGEST: "without the k strongest",
    REMOVE_RANDOM: "without k random ones",
    FIRST_LAYERS: "without the first n layers",
    LAST_LAYERS: "without the last n layers",
}


def plot_diagnostics(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what `diagnose` returned: `rank-ablation.png`, `layer-removal.png`, `update-norm.png` and
    `logit-attribution.png`."""
    return [
        _rank_ablation(found, folder / "rank-ablation.png"),
        _layer_removal(found, folder / "layer-removal.png"),
        _update_norm(found, folder / "update-norm.png"),
        _logit_attribution(found, folder / "logit-attribution.png"),
    ]


def _rank_ablation(found: dict[str, Any], path: Path) -> Path:
    of = style.figure(9, 4.6)
    at = of.subplots()
    curves = found["rank_ablation"]
    counts = [point["at"] for point in next(iter(curves.values()))]
    for number, (name, points) in enumerate(curves.items()):
        _curve(at, list(range(len(counts))), points, number, _NAMES[name])
    at.set_xticks(range(len(counts)), [str(count) for count in counts])
    style.axis(at, x=f"k directions of every layer's update (all: {counts[-1]})", y=_metric(found))
    _score_axis(at, found)
    style.title(of, "How many directions of an adapter carry its answers", _details(found))
    style.legend(of, at)
    return style.save(of, path)


def _layer_removal(found: dict[str, Any], path: Path) -> Path:
    of = style.figure(12, 4.6)
    one_at, many_at = of.subplots(1, 2, sharey=True)
    curves = found["layer_removal"]
    intact, none = curves[FIRST_LAYERS][0]["score"], curves[FIRST_LAYERS][-1]["score"]
    points = curves[ONE_LAYER]
    heights, errors = style.bars_of(points)
    layers = [point["at"] for point in points]
    one_at.bar(layers, heights, yerr=errors, color=style.BLUE, error_kw={"elinewidth": 1, "capsize": 3})
    _layer_ticks(one_at, found)
    style.axis(one_at, x="layer whose update is left out", y=_metric(found), name="Without one layer's update")
    for number, name in enumerate((FIRST_LAYERS, LAST_LAYERS)):
        _curve(many_at, [p["at"] for p in curves[name]], curves[name], number + 1, _NAMES[name])
    many_at.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.axis(many_at, x="n layers whose updates are left out", name="Without several layers' updates")
    for at in (one_at, many_at):
        at.axhline(intact, color="black", linestyle="--", linewidth=1, label="whole adapter" if at is many_at else None)
        at.axhline(none, color=style.GREY, linestyle=":", linewidth=1.4, label="no adapter" if at is many_at else None)
        _score_axis(at, found)
    style.title(of, "Which layers' updates the answers need", _details(found))
    style.legend(of, many_at)
    return style.save(of, path)


def _update_norm(found: dict[str, Any], path: Path) -> Path:
    of = style.figure(12, 4.4)
    panels = of.subplots(1, 2)
    names = {"frobenius": "Frobenius norm of s·BᵀA", "relative": "relative to the frozen weight's norm"}
    width = 0.8 / len(found["modules"])
    for at, (kind, name) in zip(panels, names.items(), strict=True):
        for number, module in enumerate(found["modules"]):
            values = found["update_norm"][module][kind]
            places = np.arange(len(values)) + (number - (len(found["modules"]) - 1) / 2) * width
            colour, hatch = style.COLOURS[number % 6], style.HATCHES[number % 6]
            at.bar(places, values, width, color=colour, hatch=hatch, edgecolor="white", label=module)
        _layer_ticks(at, found)
        style.axis(at, x="text layer", name=name[0].upper() + name[1:])
        at.grid(axis="y", alpha=0.3)
    style.title(of, "How large every layer's update is", f"mean over {found['videos']} videos' adapters")
    style.legend(of, panels[0])
    return style.save(of, path)


def _logit_attribution(found: dict[str, Any], path: Path) -> Path:
    leads = found["logit_attribution"]
    of = style.figure(11, 4.6)
    at = of.subplots()
    for number, (name, label) in enumerate({"adapter": "the adapter's update", "base": "the frozen weights"}.items()):
        heights, errors = style.bars_of(leads[name], "mean")
        at.bar(
            np.arange(len(heights)) + (number - 0.5) * 0.4,
            heights,
            0.4,
            yerr=errors,
            color=style.COLOURS[number],
            hatch=style.HATCHES[number],
            edgecolor="white",
            label=label,
            error_kw={"elinewidth": 1, "capsize": 3},
        )
    at.axhline(0, color="black", linewidth=0.8)
    _layer_ticks(at, found)
    style.axis(at, x="text layer", y="added to the right answer's lead, logits")
    at.grid(axis="y", alpha=0.3)
    total = sum(layer["mean"] for layer in leads["adapter"])
    style.title(
        of,
        "What every layer adds to the right answer's logit over the wrong ones'",
        f"lead {leads['lead']['mean']:.2f} logits, of it {total:.2f} from the adapter's updates; {_details(found)}",
    )
    style.legend(of, at)
    return style.save(of, path)


def _curve(at: Axes, places: list[int], points: list[Point], number: int, name: str) -> None:
    heights, errors = style.bars_of(points)
    colour = style.COLOURS[number]
    at.plot(places, heights, marker=style.MARKERS[number], color=colour, label=name)
    at.fill_between(places, heights - errors[0], heights + errors[1], color=colour, alpha=0.15)


def _score_axis(at: Axes, found: dict[str, Any]) -> None:
    at.set_ylim(*style.METRIC_RANGES[found["metric"]])
    at.grid(alpha=0.3)


def _layer_ticks(at: Axes, found: dict[str, Any]) -> None:
    step = max(1, found["layers"] // 16)
    at.set_xticks(range(0, found["layers"], step))


def _metric(found: dict[str, Any]) -> str:
    return style.METRIC_NAMES[found["metric"]]


def _details(found: dict[str, Any]) -> str:
    return (
        f"{found['questions']} questions about {found['videos']} videos, rank {found['rank']}; "
        "95 % intervals over videos"
    )
