"""Pictures of an evaluation: every arm's score for each type of question, and of videos in several chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from f2l_vllm.evaluation.plots import style


def plot_scores(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what `evaluate` returned: `scores.png`, and `composition.png` if chunks were composed."""
    drawn = [_by_type(result, folder / "scores.png")]
    if result.get("composition"):
        drawn.append(_composition(result, folder / "composition.png"))
    return drawn


def _by_type(result: dict[str, Any], path: Path) -> Path:
    metric, arms = result["configuration"]["metric"], result["configuration"]["arms"]
    rows = result["table"]
    of = style.figure(10, 1.6 + len(rows) * (0.12 + 0.14 * len(arms)))
    at = of.subplots()
    thickness = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        heights, errors = style.bars_of([row["arms"][arm] for row in rows])
        places = np.arange(len(rows)) + (number - (len(arms) - 1) / 2) * thickness
        at.barh(
            places,
            heights,
            thickness,
            xerr=errors,
            label=style.ARM_NAMES.get(arm, arm),
            color=style.COLOURS[number],
            hatch=style.HATCHES[number],
            edgecolor="white",
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        for place in places[heights == 0]:
            at.text(0.004, place, "0", va="center", fontsize=7, color=style.GREY)
    several = len({row["dataset"] for row in rows}) > 1
    names = [f"{row['dataset']}: {row['type']}" if several else row["type"] for row in rows]
    labels = [f"{name}{' (apart)' if row.get('apart') else ''}" for name, row in zip(names, rows, strict=True)]
    at.set_yticks(range(len(rows)), labels)
    at.get_yticklabels()[0].set_fontweight("bold")
    at.axhline(0.5, color=style.GREY, linewidth=0.8)
    at.set_ylim(len(rows) - 0.5, -0.5)
    at.set_xlim(*style.METRIC_RANGES[metric])
    style.axis(at, x=style.METRIC_NAMES[metric])
    at.grid(axis="x", alpha=0.3)
    style.title(
        of,
        "Where an answer comes from, and how often it is right",
        f"{rows[0]['n']} questions about {rows[0]['videos']} videos; lines: 95 % interval over videos",
    )
    style.legend(of, at)
    return style.save(of, path)


def _composition(result: dict[str, Any], path: Path) -> Path:
    metric = result["configuration"]["metric"]
    parts = result["composition"]
    of = style.figure(max(7.5, 1.4 * len(parts)), 4.5)
    at = of.subplots()
    heights, errors = style.bars_of(list(parts.values()))
    drawn = at.bar(
        range(len(parts)), heights, 0.6, yerr=errors, color=style.BLUE, error_kw={"elinewidth": 1.2, "capsize": 5}
    )
    ratios = [part["ratio"] for part in parts.values()]
    notes = [
        f"{part['score']:.3f}" + (f"\n{100 * ratio['value']:.1f} % of 1 chunk" if ratio and number else "")
        for number, (part, ratio) in enumerate(zip(parts.values(), ratios, strict=True))
    ]
    at.bar_label(drawn, notes, label_type="center", color="white", fontweight="bold")
    at.set_xticks(range(len(parts)), list(parts))
    at.set_ylim(*style.METRIC_RANGES[metric])
    style.axis(at, x="the video internalized in", y=style.METRIC_NAMES[metric])
    at.grid(axis="y", alpha=0.3)
    first = next(iter(parts.values()))
    style.title(
        of,
        "One video in several chunks, composed in rank space",
        f"{first['n']} questions about {first['videos']} videos; lines: 95 % interval over videos",
    )
    return style.save(of, path)
