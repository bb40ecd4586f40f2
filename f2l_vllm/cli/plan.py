"""`f2l-vllm plan`: adapter, KV cache or frames, with the arithmetic."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from f2l_vllm.bench import planner
from f2l_vllm.evaluation import environment
from f2l_vllm.files import write_whole

console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)
_NAMES = {planner.ADAPTER: "adapters", planner.KV: "KV caches of the frames", planner.FRAMES: "frames every time"}


def plan(
    need: planner.Need, shape: str, measured: Sequence[Path], resolution: int | None, json_to: Path | None
) -> None:
    """Print what each way costs, the cheapest first."""
    try:
        tables = planner.Measured(measured or planner.tables(shape, environment.machine()), resolution)
        found = planner.plan(tables, need)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(
        f"{found['model']}, {need.questions} questions about each of {need.videos} videos of {need.frames} frames "
        f"({found['resolution']} px), {need.memory / 2**30:g} GiB; times of {found['machine']}",
        highlight=False,
    )
    table = Table()
    table.add_column("way")
    for name in ("first question, s", "later ones, s", "all, s", "state, GB", "kept"):
        table.add_column(name, justify="right")
    for way in found["ways"]:
        state = f"{way['state_bytes'] / 1e9:,.2f}" if way["state_bytes"] else "–"
        figures = [f"{way['first_s']:.3f}", f"{way['later_s']:.3f}", f"{way['total_s']:,.1f}", state]
        table.add_row(_NAMES[way["way"]], *figures, f"{way['kept']:.0%}" if way["state_bytes"] else "–")
    console.print(table)
    for way in found["ways"]:
        console.print(f"{_NAMES[way['way']]}:", highlight=False)
        for line in way["arithmetic"]:
            console.print(f"  {line}", highlight=False)
    for other, count in found["break_even"].items():
        when = "never" if count is None else f"from {count} questions about a video on"
        console.print(f"adapters cost no more than {_NAMES[other]}: {when}", highlight=False)
    console.print(f"assumed: {'; '.join(found['assumptions'])}", highlight=False)
    console.print(f"best: {_NAMES[found['best']]}", style="bold", highlight=False)
    if json_to is not None:
        write_whole(json_to, json.dumps(found, indent=1) + "\n")
