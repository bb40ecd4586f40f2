"""`f2l-vllm bench`: a suite of measurements against real servers, with results as JSON, tables and pictures."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from openai import APIConnectionError, APIError
from rich.console import Console

from f2l_vllm.bench import plots, report, run, running, shapes
from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.client import WrongAnswer
from f2l_vllm.bench.vllm_client import TrafficFailed
from f2l_vllm.cli.evaluate import stoppable
from f2l_vllm.files import write_whole
from f2l_vllm.server_process import ServerFailed

console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)


def bench(
    chosen: suites.Suite,
    api_key: str,
    shape: str | None,
    model: str | None,
    hypernetwork: str | None,
    work: Path | None,
    resume: bool,
    json_to: Path,
    plots_to: Path | None,
    markdown_to: Path | None,
) -> None:
    """Measure, write the results after every cell, and show them; exit with 1 when it cannot be done.

    Args:
        chosen: the suite, with its replaced keys.
        work: keeps random models, videos and servers' data for the next run; without it only the models are kept.
    """
    try:
        with _folder(work) as folder, stoppable():
            subject: shapes.Subject | running.RunningServer
            if isinstance(chosen, suites.OfVideos | suites.Ramp) and chosen.base_url is not None:
                subject = running.reach(chosen.base_url, api_key)
                chosen = chosen.model_copy(update=running.measurable(chosen, _say))
            elif model is None:
                kept = shapes.cache_folder() if work is None else folder / "shapes"
                subject = shapes.of_shape(shape or shapes.TINY, kept, chosen.dtype)
            else:
                subject = shapes.of_model(model, hypernetwork, chosen.dtype)
            _say(f"{chosen.suite} of {subject.name} in {subject.dtype}, in {folder}")
            result = asyncio.run(run.measure(chosen, subject, folder, json_to, resume, _say))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except (ServerFailed, APIError, WrongAnswer, TrafficFailed) as error:
        cause = f" ({error.__cause__!r})" if isinstance(error, APIConnectionError) else ""  # openai's message has none
        console.print(f"{error}{cause}", style="red", markup=False, highlight=False)
        if json_to.exists():
            console.print(f"{json_to} holds the cells that were measured; --resume goes on from there")
        raise typer.Exit(1) from error
    _show(result, plots_to, markdown_to)


def again(path: Path, plots_to: Path | None, markdown_to: Path | None) -> None:
    """Show a result that was written before; nothing is measured."""
    try:
        _show(run.measured(path), plots_to, markdown_to)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _show(result: dict[str, Any], plots_to: Path | None, markdown_to: Path | None) -> None:
    console.print(report.table(result))
    for line in (report.LEGENDS[result["suite"]], *report.sentences(result)):
        console.print(line, markup=False, highlight=False)
    if markdown_to is not None:
        write_whole(markdown_to, report.markdown(result))
    for path in plots.plot(result, plots_to) if plots_to is not None else []:
        console.print(f"written: {path}", highlight=False)


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
