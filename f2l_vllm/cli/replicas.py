"""`f2l-vllm plan --replicas`: how many servers, simulated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from f2l_vllm.cluster import capacity
from f2l_vllm.cluster.simulation import Scenario
from f2l_vllm.files import write_whole

console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)
_LEGEND = (
    "ms: added to the first token, waiting included; throughput: of servers that always have work, 1 if every adapter "
    "were in memory; busiest: its questions over the mean"
)


def plan(
    replicas: str, scenario: dict[str, Any], policies: str | None, seeds: int, price: float | None, json_to: Path | None
) -> None:
    """Print what each number of servers comes to under each policy.

    Args:
        replicas, policies: by comma; without policies all of them.
        scenario: fields of `Scenario`; what is left out has its default.
    """
    try:
        counts = _counts(replicas)
        assumed = Scenario(counts[0], **scenario)
        names = [name.strip() for name in policies.split(",")] if policies is not None else [*capacity.POLICIES]
        found = capacity.plan(assumed, counts, names, seeds, price)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    asked = "as many questions as they answer" if assumed.rate is None else f"{assumed.rate:g} questions a second"
    console.print(f"{asked} about {assumed.videos} videos, Zipf {assumed.zipf:g}", highlight=False)
    console.print(
        f"each server: {assumed.places} adapters in memory, {assumed.copies} on disk, {assumed.concurrency} questions "
        f"at once; first token {assumed.first_token_s * 1e3:g} ms, answer {assumed.answer_s * 1e3:g} ms, load "
        f"{assumed.load_s * 1e3:g} ms, fetch {assumed.fetch_s * 1e3:g} ms",
        highlight=False,
    )
    table = Table("servers", "policy")
    cost = "engine_hours_per_million" if price is None else "price_per_million"
    columns = ("hit rate", "from store", "median, ms", "p99, ms", "throughput", "busiest")
    for name in (*columns, "engine-h / 1M" if price is None else "price / 1M"):
        table.add_column(name, justify="right")
    for row in found["rows"]:
        table.add_row(str(row["servers"]), row["policy"], *_cells(row, cost))
    console.print(table)
    console.print(f"{_LEGEND}; median of {seeds} seeds ± half of their range", highlight=False)
    if not all(row["settled"] for row in found["rows"]):
        console.print("some caches were still filling after a million questions: expect more hits", highlight=False)
    if json_to is not None:
        write_whole(json_to, json.dumps(found, indent=1) + "\n")


def _counts(replicas: str) -> list[int]:
    try:
        return [int(part) for part in replicas.split(",")]
    except ValueError:
        raise ValueError(f"--replicas {replicas!r}: give numbers of servers by comma, e.g. 2,4,8") from None


def _cells(row: dict[str, Any], cost: str) -> list[str]:
    throughput = _shown(row["throughput_of_resident"], 2)
    if row["overloaded"]:
        most = row["questions_per_second_at_most"]["min"]
        return ["overloaded", f"over {most:,.0f}/s", "–", "–", throughput, "–", "–"]
    return [
        _shown(row["hit_rate"], 2),
        _shown(row["store_share"], 2),
        _shown(row["added_median_ms"], 1),
        _shown(row["added_p99_ms"], 0),
        throughput,
        _shown(row["imbalance"], 2),
        f"{row[cost]:,.2f}",
    ]


def _shown(spread: dict[str, float], digits: int) -> str:
    """The median, and half of the way from the least to the most."""
    return f"{spread['median']:,.{digits}f} ±{(spread['max'] - spread['min']) / 2:,.{digits}f}"
