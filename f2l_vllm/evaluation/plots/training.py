"""Picture of a training run from its log: loss, gradient norm and learning rate of every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from f2l_vllm.evaluation.plots import style

_FIGURES = {
    "loss": "loss",
    "validation": "validation loss",
    "norm": "gradient norm",
    "factor": "learning rate, of its largest",
    "lr": "learning rate",
}
_SMOOTHED = "smoothed"


def plot_training(log: Path, folder: Path) -> list[Path]:
    """Draw `training.png` from a log of JSON lines with `stage`, `step`, `loss` and any of `smoothed`, `validation`,
    `norm`, `factor` and `lr`.

    Raises:
        ValueError: the file is not such a log; the message names file and line.
    """
    lines = _read(log)
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    names = [name for name in _FIGURES if any(name in line for line in lines)]
    of = style.figure(1.5 + 3.6 * len(stages), 1.2 + 2.2 * len(names))
    panels = of.subplots(len(names), len(stages), squeeze=False, sharex="col")
    for column, stage in enumerate(stages):
        for row, name in enumerate(names):
            at = panels[row][column]
            some = [line for line in lines if line["stage"] == stage and name in line]
            steps = [line["step"] for line in some]
            at.plot(steps, [line[name] for line in some], color=style.BLUE, linewidth=1, alpha=0.45 if row == 0 else 1)
            if name == "loss" and all(_SMOOTHED in line for line in some):
                at.plot(steps, [line[_SMOOTHED] for line in some], color=style.VERMILION, linewidth=1.8)
            if name in ("loss", "validation", "norm"):
                at.set_yscale("log")
                style.plain_ticks(at.yaxis)
            style.axis(
                at,
                x="step" if row == len(names) - 1 else "",
                y=_FIGURES[name] if column == 0 else "",
                name=stage if row == 0 else "",
            )
            at.grid(alpha=0.3)
    smoothed = any(_SMOOTHED in line for line in lines)
    details = "loss: of single steps (thin) and smoothed (thick)" if smoothed else "loss of single steps"
    style.title(of, "The course of training, stage by stage", details)
    return [style.save(of, folder / "training.png")]


def _read(log: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(log.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{log}, line {number}: not JSON; give the log.jsonl of a training run") from error
        if not isinstance(line, dict) or not {"stage", "step", "loss"} <= set(line):
            raise ValueError(f"{log}, line {number}: no stage, step and loss; give the log.jsonl of a training run")
        lines.append(line)
    if not lines:
        raise ValueError(f"{log} holds no step: train first")
    return lines
