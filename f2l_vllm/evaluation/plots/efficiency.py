"""A picture of accuracy over cost: the score of every way to answer, over its prompt's tokens and its first token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from f2l_vllm.evaluation.plots import style

_NAMES = {
    "frames-cached": "frames, keys and values kept",
    "frames-merged": "frames, merged",
    "adapter-merged": "adapter of merged tokens",
}


def plot_efficiency(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what `efficiency` returned: `efficiency.png`."""
    of = style.figure(12, 4.8)
    left, right = of.subplots(1, 2, sharey=True)
    metric = result["metric"]
    for number, row in enumerate(result["rows"]):
        if row["score"] is None or row["ttft_ms"] is None:
            continue
        _, error = style.bars_of([row])
        look = {
            "label": style.ARM_NAMES.get(row["arm"], _NAMES.get(row["arm"], row["arm"])),
            "color": (*style.COLOURS, style.GREY)[number],
            "marker": (*style.MARKERS, "X")[number],
            "markersize": 9,
            "linestyle": "none",
            "capsize": 3,
        }
        left.errorbar([row["prompt_tokens"]], [row["score"]], yerr=error, **look)
        right.errorbar([row["ttft_ms"]["median"]], [row["score"]], yerr=error, **look)
    for at, name in ((left, "tokens of the prompt"), (right, "first token, ms")):
        at.set_xscale("log")
        style.plain_ticks(at.xaxis)
        style.axis(at, x=name, y=style.METRIC_NAMES[metric] if at is left else "")
        at.grid(alpha=0.3)
    low, high = style.METRIC_RANGES[metric]
    left.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))  # room for whole markers
    style.legend(of, left)
    first = result["rows"][0]
    style.title(
        of,
        "Accuracy over cost",
        f"{first['n']} questions about {first['videos']} videos; dropping and merging leave {result['keep_rate']:.0%} "
        "of the visual tokens; lines: 95 % interval over videos",
    )
    return [style.save(of, folder / "efficiency.png")]
