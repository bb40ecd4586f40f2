"""Results for people: markdown tables in the paper's layout, and a short table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from f2l_vllm.evaluation.questions import ADAPTER, FRAMES

_METRICS = {"exact_match": "exact match", "f1": "token F1", "judge": "judge score, 0 to 5"}
_VERDICTS = {True: "yes", False: "not shown", None: "–"}


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result as `evaluate` returns it."""
    configuration = result["configuration"]
    arms = configuration["arms"]
    compared = ADAPTER in arms and FRAMES in arms
    header = ["dataset", "type", "n", *arms]
    if compared:
        header += [f"{ADAPTER} − {FRAMES}", "non-inferior", "equivalent"]
    rows = []
    for row in result["table"]:
        name = f"{row['type']} (apart)" if row.get("apart") else row["type"]
        cells = [row["dataset"], name, str(row["n"])]
        cells += [with_interval(row["arms"][arm], "score") for arm in arms]
        if compared:
            comparison = row["comparison"]
            cells += [with_interval(comparison, "difference"), *_verdicts(comparison)]
        rows.append(cells)
    metric = configuration["metric"]
    margin, equivalence = (configuration[f"{test}_margins"][metric] for test in ("non_inferiority", "equivalence"))
    lines = [
        f"{_METRICS[metric].capitalize()}, mean [95 % interval over videos, BCa bootstrap]; non-inferior by a margin "
        f"of {margin:g}, equivalent within ±{equivalence:g} (paired t tests over videos, 5 %). "
        "A figure without an interval: every video has that value, or there is one video.",
        "",
        *_grid(header, rows, left=2),
    ]
    if "composition" in result:
        lines += ["", "The same videos internalized in pieces, composed in rank space:", "", *_composition(result)]
    if result["skipped"]:
        reasons = [f"- {one['video']}: {one['reason']}" for one in result["skipped"]]
        lines += ["", f"Left out ({len(reasons)}):", "", *reasons]
    return "\n".join(lines) + "\n"


def summary(result: dict[str, Any]) -> Table:
    """One row per arm: score, token F1, captions if they are scored apart, and what an answer costs."""
    configuration = result["configuration"]
    apart = configuration["types_apart"]
    metric = configuration["metric"]
    table = Table(title=_METRICS[metric])
    table.add_column("from")
    for name in ("score", "95 % interval", "F1", *apart, "questions", "prompt tokens", "first token, ms"):
        table.add_column(name, justify="right")
    for arm, scores in result["arms"].items():
        cost = scores["cost"]
        table.add_row(
            arm,
            _figure(scores["score"]),
            _interval(scores["ci95"]),
            _figure(scores.get("f1")),
            *(_figure(scores.get(kind, {}).get("score")) for kind in apart),
            str(scores["n"]),
            _figure(cost["prompt_tokens"], 0),
            _figure(cost["ttft_ms"], 0),
        )
    return table


def comparison_lines(result: dict[str, Any]) -> list[str]:
    """A sentence for each comparison of the adapter with the frames in context, and for the composition."""
    lines = []
    comparison = result["comparisons"].get(f"{ADAPTER} - {FRAMES}")
    if comparison is not None and comparison["difference"] is not None:
        non_inferior, equivalent = comparison["non_inferior"], comparison["equivalent"]
        shown = dict(zip(("non-inferior", "equivalent"), _verdicts(comparison), strict=True))
        lines.append(
            f"{ADAPTER} − {FRAMES}: {with_interval(comparison, 'difference')}; "
            f"non-inferior (margin {non_inferior['margin']:g}): {shown['non-inferior']}; "
            f"equivalent (±{equivalent['margin']:g}): {shown['equivalent']}"
        )
    for arm, scores in result.get("composition", {}).items():
        lines.append(f"{arm}: {with_interval(scores, 'score')}, {_ratio(scores['ratio'])} of the single adapter")
    return lines


def with_interval(estimate: dict[str, Any], name: str) -> str:
    """E.g. `0.947 [0.930, 0.961]`; a dash if there is no score."""
    if estimate[name] is None:
        return "–"
    interval = _interval(estimate["ci95"])
    return f"{_figure(estimate[name])} {interval}" if interval else _figure(estimate[name])


def _composition(result: dict[str, Any]) -> list[str]:
    rows = [
        [arm, str(s["n"]), with_interval(s, "score"), _ratio(s["ratio"]), _figure(s["f1"]), _ratio(s["f1_ratio"])]
        for arm, s in result["composition"].items()
    ]
    header = ["video in", "n", "score", "ratio to 1 chunk", "token F1", "ratio to 1 chunk"]
    return _grid(header, rows, left=1)


def _verdicts(comparison: dict[str, Any]) -> tuple[str, str]:
    if comparison["difference"] is None:
        return "–", "–"
    return _VERDICTS[comparison["non_inferior"]["shown"]], _VERDICTS[comparison["equivalent"]["shown"]]


def _ratio(ratio: dict[str, Any] | None) -> str:
    return "–" if ratio is None else with_interval(ratio, "value")


def _figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(ci95: Sequence[float] | None) -> str:
    """Empty for values without spread: a zero-width interval would claim a certainty that equal values do not give."""
    return "" if ci95 is None or ci95[0] == ci95[1] else f"[{ci95[0]:.3f}, {ci95[1]:.3f}]"


def _grid(header: list[str], rows: list[list[str]], left: int) -> list[str]:
    """A markdown table, its first `left` columns flush left."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *cells)]
