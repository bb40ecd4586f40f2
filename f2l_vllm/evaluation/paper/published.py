"""The paper's own figures, kept as data in published.yaml beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

_KEPT = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
SOURCE: str = _KEPT["source"]
MODELS: dict[str, str] = _KEPT["models"]  # of each size
SIZES = tuple(MODELS)
JUDGE, F1 = METRICS = ("judge", "f1")


@dataclass(frozen=True)
class Figure:
    """What the paper prints for one set (and style), metric and size; None where it prints nothing."""

    frames: float
    adapter: float
    difference: float
    interval: tuple[float, float] | None = None
    equivalent: bool | None = None
    non_inferior: bool | None = None


def figure(name: str, metric: str, size: str, style: str | None = None) -> Figure | None:
    """The paper's figure for a set, or for one of its styles; None: it prints none."""
    if style is not None:
        row = _KEPT["styles"].get(name, {}).get(style) if metric == JUDGE else None
        return None if row is None else Figure(*row[size])
    frames, adapter, difference, low, high, equivalent, non_inferior = _KEPT["sets"][name][metric][size]
    return Figure(frames, adapter, difference, (low, high), equivalent, non_inferior)
