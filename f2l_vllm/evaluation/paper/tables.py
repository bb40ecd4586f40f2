"""Our figures beside the paper's: as Markdown, LaTeX, and a page."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2l_vllm.evaluation.paper import published
from f2l_vllm.evaluation.paper.preparing import ABOUT
from f2l_vllm.evaluation.paper.sets import SETS
from f2l_vllm.evaluation.questions import ADAPTER, FRAMES

_SCALE = 5.0  # of the judge; the paper divides by it
_DASH = "–"
HEADER = (
    "set",
    "type",
    "n",
    "frames",
    "adapter",
    "difference",
    "non-inferior",
    "equivalent",
    "paper: frames",
    "adapter",
    "difference",
    "non-inferior",
    "equivalent",
    "ours − the paper's",
)


def result_file(metric: str) -> str:
    """The name of a set's results by this metric, in its folder."""
    return f"result-{metric}.json"


@dataclass(frozen=True)
class Report:
    """One table: a metric and a size of the paper's, a row for each set and style."""

    metric: str
    size: str
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """What the table shows."""
        name = "Judge, divided by 5" if self.metric == published.JUDGE else "Token F1"
        return f"{name}; the paper's figures are {published.MODELS[self.size]}'s"


def read(folders: Sequence[Path], metric: str, size: str) -> Report:
    """The results of prepared and run sets.

    Raises:
        ValueError: a folder was not prepared, or not run with this metric.
    """
    rows: list[tuple[str, ...]] = []
    notes = [f"The paper's figures: {published.SOURCE}. Its own sample is not stated."]
    for folder in folders:
        about = _json(folder / ABOUT, "prepare it first")
        result = _json(folder / result_file(metric), f"run it first, with the metric {metric}")
        name = about["set"]
        title = SETS[name].title
        scale = _SCALE if metric == published.JUDGE else 1.0
        whole = result["comparisons"][f"{ADAPTER} - {FRAMES}"]
        arms = result["arms"]
        figure = published.figure(name, metric, size)
        rows.append(_row(title, "all", arms[ADAPTER]["n"], arms, whole, scale, figure))
        styles = [row for row in result["table"] if len(SETS[name].prompts) > 1]
        for row in styles:
            figure = published.figure(name, metric, size, row["type"])
            rows.append(_row("", row["type"], row["n"], row["arms"], row["comparison"], scale, figure))
        if about["missing"]:
            notes.append(f"{title}: {about['examples']} of {about['examples_drawn']} examples; videos were missing.")
        unjudged = sum(arm.get("unjudged", 0) for arm in arms.values())
        if metric == published.JUDGE and unjudged:
            notes.append(f"{title}: {unjudged} answers have no score, because the judge's replies held none.")
        if result["skipped"]:
            notes.append(f"{title}: {len(result['skipped'])} left out; the results say why.")
    return Report(metric, size, tuple(rows), tuple(notes))


def markdown(report: Report) -> str:
    """A table of Markdown with its title and notes."""
    rule = ["---", "---", *["---:"] * (len(HEADER) - 2)]
    lines = [f"| {' | '.join(row)} |" for row in (HEADER, rule, *report.rows)]
    notes = [f"- {note}" for note in report.notes]
    return "\n".join([f"**{report.title}**", "", *lines, "", *notes]) + "\n"


def latex(report: Report) -> str:
    """A `tabular` of LaTeX, with booktabs."""
    head = " & ".join(_tex(cell) for cell in HEADER)
    body = [f"{' & '.join(_tex(cell) for cell in row)} \\\\" for row in report.rows]
    notes = [f"% {note}" for note in report.notes]
    columns = "ll" + "r" * (len(HEADER) - 2)
    frame = [f"% {report.title}", *notes, f"\\begin{{tabular}}{{{columns}}}", "\\toprule", f"{head} \\\\", "\\midrule"]
    return "\n".join([*frame, *body, "\\bottomrule", "\\end{tabular}"]) + "\n"


def page(reports: Sequence[Report]) -> str:
    """All tables as one HTML page without anything from elsewhere."""
    parts = []
    for report in reports:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEADER)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in report.rows)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        parts.append(f"<h2>{html.escape(report.title)}</h2><div>{table}</div><ul>{notes}</ul>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color-scheme:light dark}div{overflow-x:auto}"
        "table{border-collapse:collapse}th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #8884}"
        "th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>The paper's tables</title><style>{style}</style></head><body><h1>The paper's tables</h1>"
        f"{''.join(parts)}</body></html>\n"
    )


def _row(
    title: str,
    kind: str,
    n: int,
    arms: dict[str, Any],
    comparison: dict[str, Any],
    scale: float,
    figure: published.Figure | None,
) -> tuple[str, ...]:
    difference = comparison["difference"]
    ours = [
        *(_value(arms[arm]["score"], scale) for arm in (FRAMES, ADAPTER)),
        _with_interval(difference, comparison.get("ci95"), scale),
        *(_verdict(comparison[name]["shown"]) if difference is not None else _DASH for name in _TESTS),
    ]
    if figure is None:
        return (title, kind, str(n), *ours, *[_DASH] * 6)
    theirs = [
        _value(figure.frames),
        _value(figure.adapter),
        _with_interval(figure.difference, figure.interval),
        _verdict(figure.non_inferior),
        _verdict(figure.equivalent),
    ]
    between = _DASH if difference is None else f"{round(difference / scale - figure.difference, 3) + 0.0:+.3f}"
    return (title, kind, str(n), *ours, *theirs, between)


_TESTS = ("non_inferior", "equivalent")


def _value(value: float | None, scale: float = 1.0) -> str:
    return _DASH if value is None else f"{value / scale:.3f}"


def _with_interval(value: float | None, interval: Sequence[float] | None, scale: float = 1.0) -> str:
    if value is None:
        return _DASH
    shown = f"{value / scale:+.3f}"
    return shown if interval is None else f"{shown} [{interval[0] / scale:+.3f}, {interval[1] / scale:+.3f}]"


def _verdict(shown: bool | None) -> str:
    return _DASH if shown is None else "yes" if shown else "no"


def _tex(cell: str) -> str:
    for letter in ("\\", "&", "%", "$", "#", "_", "{", "}"):
        cell = cell.replace(letter, "\\textbackslash{}" if letter == "\\" else f"\\{letter}")
    return cell.replace("−", "$-$").replace(_DASH, "--")


def _json(path: Path, advice: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {advice} ({error})") from error
