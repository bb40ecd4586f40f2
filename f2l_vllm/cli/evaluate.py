"""`f2l-vllm eval`: how good answers to questions with known answers are, in every arm."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from openai import APIError
from rich.console import Console

from f2l_vllm import models
from f2l_vllm.cli.evaluation_extras import Extras
from f2l_vllm.cli.progress import Tell, progress
from f2l_vllm.evaluation import report
from f2l_vllm.evaluation.questions import QuestionSet
from f2l_vllm.evaluation.run import evaluate
from f2l_vllm.evaluation.setup import Setup
from f2l_vllm.evaluation.sources import manifest_questions, world_questions
from f2l_vllm.files import write_whole
from f2l_vllm.server_process import ServerFailed
from f2l_vllm.synthetic.world import Scene, sample_scenes

console = Console(width=None if sys.stdout.isatty() else 120)
_TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class QuestionSource:
    """Where questions come from: the synthetic world's `world` split, or a manifest.

    Raises:
        ValueError: both are given, or an option of the other one.
    """

    world: str | None = None
    videos: int = 64
    seed: int = 0
    phrasing: str = "seen"
    manifest: Path | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if self.manifest is not None and self.world is not None:
            raise ValueError("questions come from --world or from --manifest: give one of them")
        if self.manifest is None and self.split is not None:
            raise ValueError("--split chooses from a manifest: give --manifest, or name the world's split with --world")

    def questions(self, work: Path, bars: Tell) -> QuestionSet:
        """Write or find the videos; returns the questions about them."""
        if self.manifest is not None:
            return manifest_questions(
                self.manifest, work, split=self.split, on_progress=lambda n, of: bars("reading videos", n, of)
            )
        return world_questions(
            self.world or "held-out",
            self.videos,
            self.seed,
            work,
            phrasing=self.phrasing,
            on_progress=lambda n, of: bars("making videos", n, of),
        )

    def scenes(self) -> list[Scene] | None:
        """The world's scenes, in the order of the videos; None for a manifest."""
        if self.manifest is not None:
            return None
        return sample_scenes(self.videos, self.seed, self.world or "held-out")


def run(
    source: QuestionSource,
    setup: Setup,
    extras: Extras,
    work: Path | None,
    json_to: Path | None,
    markdown_to: Path | None,
) -> None:
    """Evaluate, print a short table, and write the results; exit with 1 when it cannot be done."""
    for path in (json_to, markdown_to):
        if path is not None and path.is_dir():
            raise typer.BadParameter(f"{path} is a directory: name a file to write")
    with _working_folder(work) as folder, stoppable():
        try:
            if setup.base_url is None:
                models.resolve_hypernetwork(setup.model, setup.hypernetwork)  # fails before any video is made
            with progress(console) as bars:
                questions = source.questions(folder, bars)
                result = evaluate(questions, setup, folder, bars)
                result |= extras.measure(questions, source.scenes(), setup, folder, bars)
            show(result)
            if json_to is not None:
                write_whole(json_to, json.dumps(result | {"command": _command()}, indent=1) + "\n")
            if markdown_to is not None:
                write_whole(markdown_to, report.markdown(result))
            for path in extras.show(result, folder, questions.metric):
                console.print(f"written: {path}", highlight=False, soft_wrap=True)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        except (ServerFailed, APIError) as error:
            where = f"{error.request.url}: " if isinstance(error, APIError) else ""
            console.print(f"{where}{error}", style="red", markup=False, highlight=False)
            if work is not None:
                console.print(f"what was answered is kept in {work}: repeat the command to go on")
            raise typer.Exit(1) from error


def show(result: dict[str, Any]) -> None:
    """Print the short table."""
    console.print(report.summary(result))
    for line in report.comparison_lines(result):
        console.print(line, highlight=False)
    for one in result["skipped"][:10]:
        console.print(f"left out: {one['video']}: {one['reason']}", style="yellow", markup=False, highlight=False)
    if len(result["skipped"]) > 10:
        console.print(f"… and {len(result['skipped']) - 10} more left out", style="yellow")
    unjudged = sum(scores.get("unjudged", 0) for scores in result["arms"].values())
    if unjudged:
        console.print(f"{unjudged} answers have no judge's score: its replies held none", style="yellow")


def _command() -> str:
    return " ".join(["f2l-vllm", *sys.argv[1:]])


@contextmanager
def _working_folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="f2l-eval-") as folder:
        yield Path(folder)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let a termination signal end the block like an error, so that the server started in it is stopped."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
