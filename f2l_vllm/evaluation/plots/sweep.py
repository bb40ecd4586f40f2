"""Pictures of a sweep over frames and resolution: score, time to the first token and prompt tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LogNorm, Normalize

from f2l_vllm.evaluation.plots import style

_LINES = ("-", "--", ":", "-.")


class _Quantity(NamedTuple):
    """A column of pictures. `range`: all possible values, for a linear scale; None for a logarithmic scale."""

    name: str
    of: Callable[[dict[str, Any]], float | None]
    digits: int
    range: tuple[float, float] | None = None


def plot_sweep(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what `sweep` returned: `sweep-heat-maps.png` and `sweep-over-frames.png`.

    Quantities that were not measured (no time to the first token without a server) are left out.
    """
    rows, metric = found["rows"], found["metric"]
    quantities = [
        _Quantity(style.METRIC_NAMES[metric], lambda row: row["score"], 2, style.METRIC_RANGES[metric]),
        _Quantity("first token, ms, first question", lambda row: _ttft(row, "first"), 0),
        _Quantity("first token, ms, later questions", lambda row: _ttft(row, "later"), 0),
        _Quantity("prompt tokens", lambda row: row["prompt_tokens"], 0),
    ]
    measured = [q for q in quantities if any(q.of(row) is not None for row in rows)]
    return [
        _heat_maps(rows, measured, folder / "sweep-heat-maps.png"),
        _over_frames(rows, measured, folder / "sweep-over-frames.png"),
    ]


def _ttft(row: dict[str, Any], which: str) -> float | None:
    """The median over first, or over later, questions about a video; None if nothing was measured."""
    times: dict[str, Any] = (row["ttft_ms"] or {}).get(which, {})
    return times.get("median")


def _heat_maps(rows: list[dict[str, Any]], quantities: list[_Quantity], path: Path) -> Path:
    frames, edges, arms = (_values(rows, name) for name in ("frames", "resolution", "arm"))
    of = style.figure(
        2 + len(quantities) * max(3.5, 1.2 + 0.75 * len(frames)), 1.6 + len(arms) * (1.4 + 0.5 * len(edges))
    )
    panels = of.subplots(len(arms), len(quantities), squeeze=False)
    for column, quantity in enumerate(quantities):
        found = [value for row in rows if (value := quantity.of(row)) is not None]
        norm = _norm(min(found), max(found), quantity.range)
        images = []
        for line, arm in enumerate(arms):
            at = panels[line][column]
            cells = {(r["resolution"], r["frames"]): quantity.of(r) for r in rows if r["arm"] == arm}
            images.append(style.heat_map(at, cells, frames, edges, norm, f"{{:.{quantity.digits}f}}".format))
            at.set_xticks(np.arange(1, len(frames)) - 0.5, minor=True)
            at.set_yticks(np.arange(1, len(edges)) - 0.5, minor=True)
            at.grid(which="minor", color="white", linewidth=2)
            at.set_title(f"{quantity.name}\n{style.ARM_NAMES.get(arm, arm)}", loc="left", fontsize=10)
            if line == len(arms) - 1:
                at.set_xlabel("frames read")
            if column == 0:
                at.set_ylabel("longest edge of the file")
        bar = of.colorbar(images[0], ax=list(panels[:, column]), label=quantity.name, pad=0.02)
        if quantity.range is None:
            style.plain_ticks(bar.ax.yaxis)
    style.title(of, "Score and cost over frames and resolution", _details(rows))
    return style.save(of, path)


def _over_frames(rows: list[dict[str, Any]], quantities: list[_Quantity], path: Path) -> Path:
    frames, edges, arms = (_values(rows, name) for name in ("frames", "resolution", "arm"))
    of = style.figure(3.2 + 3.6 * len(quantities), 4.4)
    panels = of.subplots(1, len(quantities), squeeze=False)[0]
    places = {count: place for place, count in enumerate(frames)}
    for column, (at, quantity) in enumerate(zip(panels, quantities, strict=True)):
        for number, arm in enumerate(arms):
            for line, edge in enumerate(edges):
                some = sorted(
                    (r for r in rows if r["arm"] == arm and r["resolution"] == edge and quantity.of(r) is not None),
                    key=lambda row: row["frames"],
                )
                at.plot(
                    [places[row["frames"]] for row in some],
                    [quantity.of(row) for row in some],
                    _LINES[line % len(_LINES)],
                    marker=style.MARKERS[number],
                    color=style.COLOURS[number],
                    label=f"{style.ARM_NAMES.get(arm, arm)}, {edge} px",
                )
                if column == 0:
                    heights, errors = style.bars_of(some)
                    x = [places[row["frames"]] for row in some]
                    at.fill_between(
                        x, heights - errors[0], heights + errors[1], color=style.COLOURS[number], alpha=0.12
                    )
        at.set_xticks(range(len(frames)), [str(count) for count in frames])
        if quantity.range is None:
            at.set_yscale("log")
            style.plain_ticks(at.yaxis)
        else:
            at.set_ylim(*quantity.range)
        style.axis(at, x="frames read", name=quantity.name)
        at.grid(alpha=0.3)
    style.title(of, "Score and cost over the number of frames", f"{_details(rows)}; band: 95 % interval over videos")
    style.legend(of, panels[0])
    return style.save(of, path)


def _details(rows: list[dict[str, Any]]) -> str:
    asked = sorted({(row["n"], row["videos"]) for row in rows})
    questions = "–".join(str(count) for count in sorted({asked[0][0], asked[-1][0]}))
    told = " (first token: median)" if any(row["ttft_ms"] for row in rows) else ""
    return f"{questions} questions about {asked[-1][1]} videos in every cell{told}"


def _values(rows: list[dict[str, Any]], name: str) -> list[Any]:
    found = list(dict.fromkeys(row[name] for row in rows))
    return found if name == "arm" else sorted(found)


def _norm(low: float, high: float, full: tuple[float, float] | None) -> Normalize:
    """Colours over the range of the values; on a linear scale over at least a quarter of the full range, so that small
    differences look small."""
    if full is not None:
        return Normalize(min(low, high - (full[1] - full[0]) / 4), high)
    return LogNorm(low, high) if low < high else LogNorm(low / 2, high * 2)
