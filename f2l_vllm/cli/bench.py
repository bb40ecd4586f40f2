"""`f2l-vllm bench`: a suite of measurements against real servers, with results as JSON, tables and pictures."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from openai import APIConnectionError, APIError
from rich.console import Console

from f2l_vllm.bench import page, plots, report, run, running, shapes
from f2l_vllm.bench import suite as suites
from f2l_vllm.bench.client import WrongAnswer
from f2l_vllm.bench.vllm_client import TrafficFailed
from f2l_vllm.cli.evaluate import stoppable
from f2l_vllm.files import write_whole
from f2l_vllm.server_process import ServerFailed

console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)


@dataclass(frozen=True)
class Shown:
    """Where a result is written for people, besides the terminal."""

    plots: Path | None
    markdown: Path | None
    page: Path | None


def bench(
    chosen: suites.Suite,
    api_key: str,
    shape: str | None,
    model: str | None,
    hypernetwork: str | None,
    work: Path | None,
    resume: bool,
    json_to: Path,
    shown: Shown,
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
                changes = asyncio.run(running.measurable(chosen, subject, folder, _say))
                chosen = chosen.model_copy(update=changes)
            elif model is None:
                kept = shapes.cache_folder() if work is None else folder / "shapes"
                subject = shapes.of_shape(shape or shapes.TINY, kept, chosen.dtype)
            else:
                subject = shapes.of_model(model, hypernetwork, chosen.dtype)
            _say(f"{chosen.suite} of {subject.name} ({subject.dtype}), in {folder}")
            result = asyncio.run(run.measure(chosen, subject, folder, json_to, resume, _say))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except (ServerFailed, APIError, WrongAnswer, TrafficFailed) as error:
        cause = f" ({error.__cause__!r})" if isinstance(error, APIConnectionError) else ""  # openai's message has none
        console.print(f"{error}{cause}", style="red", markup=False, highlight=False)
        if json_to.exists():
            console.print(f"{json_to} holds the cells that were measured; --resume goes on from there")
        raise typer.Exit(1) from error
    _show(result, shown)


def again(path: Path, shown: Shown) -> None:
    """Show a result that was written before; nothing is measured."""
    try:
        _show(run.measured(path), shown)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _show(result: dict[str, Any], to: Shown) -> None:
    console.print(report.table(result))
    for line in (report.LEGENDS[result["suite"]], *report.sentences(result)):
        console.print(line, markup=False, highlight=False)
    if to.markdown is not None:
        write_whole(to.markdown, report.markdown(result))
    if to.page is not None:
        page.write(result, to.page)
    for path in plots.plot(result, to.plots) if to.plots is not None else []:
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
