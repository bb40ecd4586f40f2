"""`f2l-vllm bench`: a suite of measurements against real servers, its result as JSON, tables and pictures."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
import yaml
from openai import APIConnectionError, APIError
from rich.console import Console

from benchmarks import plots, report, run, shapes
from benchmarks import suite as suites
from benchmarks.client import WrongAnswer
from benchmarks.vllm_client import TrafficFailed
from f2l_vllm.commands.evaluate import stoppable
from f2l_vllm.commands.files import write_whole
from f2l_vllm.commands.server_process import ServerFailed

console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)


def bench(
    suite: str,
    shape: str | None,
    model: str | None,
    hypernetwork: str | None,
    changes: Mapping[str, Any],
    work: Path | None,
    resume: bool,
    json_to: Path,
    plots_to: Path | None,
    markdown_to: Path | None,
) -> None:
    """Measure, write what was measured after every cell, and show it; exit with 1 when it cannot be done.

    Args:
        changes: keys of the suite and their values.
        work: keeps random models, videos and servers' data for the next run; the models alone are kept without.
    """
    if shape is not None and model is not None:
        raise typer.BadParameter("a shape is a model already: give --shape or --model")
    if model is None and hypernetwork is not None:
        raise typer.BadParameter("a shape has a hypernetwork of its own: give --hypernetwork with --model")
    try:
        chosen = suites.load(suite, changes)
        with _folder(work) as folder, stoppable():
            if model is None:
                kept = shapes.cache_folder() if work is None else folder / "shapes"
                subject = shapes.of_shape(shape or shapes.TINY, kept, chosen.dtype)
            else:
                subject = shapes.of_model(model, hypernetwork, chosen.dtype)
            console.print(f"{chosen.suite} of {subject.name} in {subject.dtype}, in {folder}", highlight=False)
            result = asyncio.run(run.measure(chosen, subject, folder, json_to, resume, _say))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except (ServerFailed, APIError, WrongAnswer, TrafficFailed) as error:
        cause = f" ({error.__cause__!r})" if isinstance(error, APIConnectionError) else ""  # openai's message has none
        console.print(f"{error}{cause}", style="red", markup=False, highlight=False)
        if json_to.exists():
            console.print(f"{json_to} holds the cells that were measured; --resume goes on from there")
        raise typer.Exit(1) from error
    console.print(report.table(result))
    for line in report.sentences(result):
        console.print(line, markup=False, highlight=False)
    if markdown_to is not None:
        write_whole(markdown_to, report.markdown(result))
    for path in plots.plot(result, plots_to) if plots_to is not None else []:
        console.print(f"written: {path}", highlight=False)


def parse_changes(pairs: Sequence[str], lists: Mapping[str, str | None], values: Mapping[str, Any]) -> dict[str, Any]:
    """What is replaced of a suite.

    Args:
        pairs: `key=value`, the values as YAML.
        lists: one value, or several separated by commas; None for those not given.
        values: as they are; None for those not given.

    Raises:
        ValueError: a pair that is none.
    """
    changes = {key: value for key, value in values.items() if value is not None}
    for key, text in lists.items():
        if text is not None:
            parts = [yaml.safe_load(part) for part in text.split(",")]
            changes[key] = parts[0] if len(parts) == 1 else parts
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise ValueError(f"--set takes a key and its value, e.g. --set output_tokens=16, not {pair!r}")
        changes[key.strip().replace("-", "_")] = yaml.safe_load(value)
    return changes


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False)


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="f2l-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
