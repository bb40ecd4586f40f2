"""What all plots share: colours that everyone can tell apart, error bars, titles, legends beside the data, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from f2l_vllm.evaluation.questions import ADAPTER, EVS, FRAMES, NONE, V2DROP, WRONG_VIDEO
from f2l_vllm.files import atomic_path

# Okabe and Ito's palette works for any colour vision; markers and hatches say the same without colour.
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION)
MARKERS = ("o", "s", "^", "D", "v", "P")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
GREY = "#6b7280"
COLOUR_MAP = "cividis"

ARM_NAMES = {
    ADAPTER: "adapter (no visual token)",
    FRAMES: "frames in context",
    EVS: "frames, dropped as by EVS",
    V2DROP: "frames, dropped as by V2Drop",
    NONE: "question alone",
    WRONG_VIDEO: "another video's adapter",
}
METRIC_NAMES = {"exact_match": "exact match", "f1": "token F1", "judge": "judge score"}
METRIC_RANGES = {"exact_match": (0.0, 1.0), "f1": (0.0, 1.0), "judge": (0.0, 5.0)}

_DPI = 150


def figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, laid out so that nothing overlaps."""
    return Figure(figsize=(width, height), layout="constrained")


def title(of: Figure, subject: str, details: str) -> None:
    """Write what the picture shows above it, and how it was measured below it."""
    of.suptitle(subject, x=0.01, ha="left", fontsize=13, fontweight="bold")
    of.supxlabel(details, x=0.01, ha="left", fontsize=9, color=GREY)


def axis(at: Axes, x: str = "", y: str = "", name: str = "") -> None:
    """Label an axis pair, with a light grid behind the data."""
    at.set_xlabel(x)
    at.set_ylabel(y)
    at.set_title(name, loc="left")
    at.spines[["top", "right"]].set_visible(False)
    at.set_axisbelow(True)


def plain_ticks(along: Axis) -> None:
    """Plain numbers at 1, 2, 5, 10 ... of a logarithmic axis."""
    along.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    along.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    along.set_minor_locator(NullLocator())


def bars_of(estimates: Sequence[dict[str, Any]], key: str = "score") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Heights [N], NaN where there is none, and error bars [2, N], zero where there is no interval."""
    values = np.array([np.nan if e[key] is None else e[key] for e in estimates], dtype=np.float64)
    ends = np.array([e["ci95"] or (v, v) for e, v in zip(estimates, values, strict=True)], dtype=np.float64)
    errors = np.abs(ends.T - values)
    return values, np.nan_to_num(errors)


def heat_map(
    at: Axes,
    cells: Mapping[tuple[int, int], float | None],
    frames: Sequence[int],
    edges: Sequence[int],
    norm: Normalize,
    write: Callable[[float], str],
) -> AxesImage:
    """Colours and numbers over frames and resolution. `cells`: (longest edge, frames) -> value, if there is one."""
    values = np.array([[cells.get((edge, count)) for count in frames] for edge in edges], dtype=np.float64)
    drawn = at.imshow(values, cmap=COLOUR_MAP, norm=norm, origin="lower", aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "black" if norm(value) > 0.55 else "white"
            at.text(x, y, write(value), ha="center", va="center", color=ink)
    at.set_xticks(range(len(frames)), [str(count) for count in frames])
    at.set_yticks(range(len(edges)), [f"{edge} px" for edge in edges])
    at.tick_params(which="both", length=0)
    at.spines[:].set_visible(False)
    return drawn


def legend(of: Figure, at: Axes) -> None:
    """One legend for all panels, beside them."""
    handles, labels = at.get_legend_handles_labels()
    of.legend(handles, labels, loc="outside right center", frameon=False)


def save(of: Figure, path: Path) -> Path:
    """Write a PNG file, whole or not at all; its folder is made."""
    with atomic_path(path) as staging:
        of.savefig(staging, dpi=_DPI, facecolor="white")
    return path
