"""The paper's own figures: tables 1 to 4 of arXiv 2606.04351, version 1, from a converted text of it.

Scores of the judge are divided by its scale of 5. Differences are printed ones, not always those of the printed means.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2606.04351v1, tables 1 to 4"
SIZES = ("500m", "2.2b")
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


# name: metric: one row for each size: frames, adapter, difference, low, high, equivalent, non-inferior
_ROWS: dict[str, dict[str, tuple[tuple[float, float, float, float, float, bool, bool], ...]]] = {
    "activitynet-captions": {
        JUDGE: ((0.428, 0.356, -0.072, -0.104, -0.041, True, True), (0.576, 0.492, -0.084, -0.113, -0.057, True, True)),
        F1: ((0.236, 0.243, 0.007, 0.002, 0.012, True, True), (0.263, 0.256, -0.007, -0.012, -0.002, True, True)),
    },
    "plm-rdcap": {
        JUDGE: ((0.308, 0.263, -0.045, -0.069, -0.021, True, True), (0.326, 0.316, -0.010, -0.032, 0.012, True, True)),
        F1: ((0.189, 0.198, 0.009, 0.005, 0.013, True, True), (0.198, 0.207, 0.009, 0.005, 0.013, True, True)),
    },
    "plm-rcap": {
        JUDGE: ((0.252, 0.242, -0.011, -0.031, 0.009, True, True), (0.270, 0.287, 0.017, 0.001, 0.034, True, True)),
        F1: ((0.177, 0.203, 0.026, 0.021, 0.031, True, True), (0.199, 0.204, 0.005, 0.001, 0.010, True, True)),
    },
    "vdc": {
        JUDGE: ((0.515, 0.406, -0.108, -0.118, -0.098, True, True), (0.539, 0.511, -0.028, -0.037, -0.019, True, True)),
        F1: ((0.315, 0.288, -0.027, -0.030, -0.025, True, True), (0.297, 0.304, 0.007, 0.003, 0.010, True, True)),
    },
    "carebench": {
        JUDGE: ((0.334, 0.278, -0.056, -0.067, -0.045, True, True), (0.437, 0.369, -0.068, -0.078, -0.058, True, True)),
        F1: ((0.295, 0.275, -0.020, -0.023, -0.017, True, True), (0.292, 0.279, -0.013, -0.015, -0.010, True, True)),
    },
    "nextqa": {
        JUDGE: ((0.501, 0.547, 0.046, 0.007, 0.084, True, True), (0.597, 0.610, 0.013, -0.022, 0.048, True, True)),
        F1: (
            (0.129, 0.068, -0.061, -0.076, -0.046, False, False),
            (0.140, 0.076, -0.063, -0.079, -0.048, False, False),
        ),
    },
    "activitynet-qa": {
        JUDGE: ((0.524, 0.541, 0.016, -0.031, 0.064, True, True), (0.627, 0.531, -0.096, -0.144, -0.049, True, True)),
        F1: (
            (0.197, 0.023, -0.174, -0.199, -0.149, False, False),
            (0.149, 0.013, -0.136, -0.156, -0.117, False, False),
        ),
    },
    "plm-sgqa": {
        JUDGE: (
            (0.390, 0.317, -0.074, -0.113, -0.034, True, True),
            (0.493, 0.295, -0.198, -0.236, -0.161, False, False),
        ),
        F1: ((0.081, 0.225, 0.145, 0.131, 0.158, False, True), (0.092, 0.203, 0.111, 0.098, 0.124, False, True)),
    },
    "vidcapbench": {
        JUDGE: ((0.502, 0.451, -0.050, -0.071, -0.030, True, True), (0.551, 0.475, -0.076, -0.096, -0.055, True, True)),
        F1: ((0.216, 0.209, -0.007, -0.019, 0.004, True, True), (0.196, 0.218, 0.022, 0.010, 0.033, True, True)),
    },
}
# The judge's means by style, tables 2 and 3: frames, adapter, difference for each size.
_STYLES: dict[str, dict[str, tuple[tuple[float, float, float], ...]]] = {
    "vdc": {
        "short": ((0.629, 0.535, -0.094), (0.556, 0.579, 0.022)),
        "detailed": ((0.476, 0.401, -0.074), (0.526, 0.463, -0.063)),
        "camera": ((0.310, 0.131, -0.178), (0.478, 0.392, -0.085)),
        "background": ((0.642, 0.523, -0.117), (0.588, 0.606, 0.018)),
        "main object": ((0.517, 0.442, -0.075), (0.546, 0.514, -0.032)),
    },
    "carebench": {
        "caption": ((0.418, 0.324, -0.094), (0.465, 0.400, -0.065)),
        "events": ((0.201, 0.169, -0.032), (0.340, 0.267, -0.073)),
        "objects": ((0.368, 0.327, -0.043), (0.457, 0.392, -0.065)),
        "spatial": ((0.424, 0.329, -0.095), (0.519, 0.426, -0.094)),
        "temporal": ((0.260, 0.242, -0.018), (0.404, 0.360, -0.045)),
    },
}


def figure(name: str, metric: str, size: str, style: str | None = None) -> Figure | None:
    """The paper's figure for a set, or for one of its styles; None: it prints none."""
    place = SIZES.index(size)
    if style is not None:
        row = _STYLES.get(name, {}).get(style) if metric == JUDGE else None
        return None if row is None else Figure(*row[place])
    frames, adapter, difference, low, high, equivalent, non_inferior = _ROWS[name][metric][place]
    return Figure(frames, adapter, difference, (low, high), equivalent, non_inferior)
