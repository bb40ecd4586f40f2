"""What `f2l-vllm eval` does besides scoring: a sweep, diagnostics, plots, a page to browse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2l_vllm import models
from f2l_vllm.evaluation.answers import ANSWERS_FILE, read_answers
from f2l_vllm.evaluation.questions import QuestionSet
from f2l_vllm.evaluation.setup import Setup
from f2l_vllm.evaluation.sweep import Grid, sweep
from f2l_vllm.synthetic.world import Scene

Progress = Callable[[str, int, int], None]
SWEEP_FOLDER, EFFICIENCY_FOLDER = "sweep", "efficiency"
_FILMS_FOLDER = "videos"


@dataclass(frozen=True)
class Extras:
    """The wanted extras; None or False for those not wanted.

    Attributes:
        plots: folder for pictures of everything that was measured.
        browse: folder for the page; must be new or empty.

    Raises:
        ValueError: a folder that cannot be written to.
    """

    sweep: Grid | None = None
    diagnostics: bool = False
    efficiency: bool = False
    plots: Path | None = None
    browse: Path | None = None

    def __post_init__(self) -> None:
        for name, folder in (("--plots", self.plots), ("--browse", self.browse)):
            if folder is not None and folder.exists() and not folder.is_dir():
                raise ValueError(f"{name} {folder} is a file: name a folder")
        if self.browse is not None and self.browse.is_dir() and any(self.browse.iterdir()):
            raise ValueError(f"--browse {self.browse} is not empty: name a new folder")

    @classmethod
    def of(
        cls,
        swept: bool,
        frames: str,
        resolutions: str,
        diagnostics: bool,
        efficiency: bool,
        plots: Path | None,
        browse: Path | None,
        setup: Setup,
    ) -> Extras:
        """From the options of the command line; refuses at once what could not be done later.

        Raises:
            ValueError: a sweep through a running server, or options that make no sense.
        """
        if swept and setup.base_url is not None:
            raise ValueError("--sweep starts a server for each number of frames: leave out --base-url")
        grid = Grid(numbers("--sweep-frames", frames), numbers("--sweep-resolutions", resolutions)) if swept else None
        if efficiency and setup.keep_rate == 1:
            raise ValueError("--efficiency compares ways to read fewer tokens: give --keep-rate below 1")
        return cls(grid, diagnostics, efficiency, plots, browse)

    def measure(
        self, questions: QuestionSet, scenes: list[Scene] | None, setup: Setup, work: Path, progress: Progress
    ) -> dict[str, Any]:
        """`sweep`, `efficiency` and `diagnostics`, if wanted, as JSON.

        Args:
            scenes: of the world, in the order of the clips; None for the files of a manifest.
        """
        found: dict[str, Any] = {}
        if self.sweep is not None:
            found["sweep"] = _sweep(questions, scenes, setup, self.sweep, work / SWEEP_FOLDER, progress)
        if self.efficiency:
            from f2l_vllm.evaluation.efficiency import efficiency

            found["efficiency"] = efficiency(questions, setup, work / EFFICIENCY_FOLDER, progress)
        if self.diagnostics:
            from f2l_vllm.evaluation.diagnostics.measure import diagnose
            from f2l_vllm.evaluation.in_process import TransformersAnswers

            answers = TransformersAnswers(setup.model, setup.hypernetwork, setup.reading, max_tokens=setup.max_tokens)
            found["diagnostics"] = diagnose(
                answers, questions, on_progress=lambda n, of: progress("diagnostics", n, of)
            )
        return found

    def show(self, result: dict[str, Any], work: Path, metric: str) -> list[Path]:
        """Draw the plots and write the page, if wanted; returns the written files.

        Args:
            metric: decides which answers the page marks as right.
        """
        written: list[Path] = []
        if self.plots is not None:
            from f2l_vllm.evaluation import plots

            written += plots.plot_scores(result, self.plots)
            if "sweep" in result:
                written += plots.plot_sweep(result["sweep"], self.plots)
            if "efficiency" in result:
                written += plots.plot_efficiency(result["efficiency"], self.plots)
            if "diagnostics" in result:
                written += plots.plot_diagnostics(result["diagnostics"], self.plots)
        if self.browse is not None:
            from f2l_vllm.evaluation.browse import write_page

            arms = {*result["configuration"]["arms"], *result.get("composition", {})}
            answers = [answer for answer in read_answers(work / ANSWERS_FILE) if answer.arm in arms]
            title = f"Videos, questions and answers: {result['configuration'].get('model', 'a served model')}"
            written.append(write_page(answers, work, self.browse, metric=metric, title=title))
        return written


def _sweep(
    questions: QuestionSet, scenes: list[Scene] | None, setup: Setup, grid: Grid, work: Path, progress: Progress
) -> dict[str, Any]:
    from f2l_vllm.evaluation import footage

    identity: dict[str, Any] = {"resolutions": list(grid.resolutions)}
    if scenes is None:
        film = footage.of_files(questions.clips)
    else:
        seconds = max(grid.frames) / _frames_per_second(setup.model)
        identity["seconds"] = seconds
        film = footage.of_scenes(scenes, seconds)
    filmed, edge_of = footage.at_resolutions(questions, film, grid.resolutions, work / _FILMS_FOLDER, identity)
    return sweep(filmed, edge_of, setup, grid, work, progress)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers by comma.

    Raises:
        ValueError: the text holds something else; the message names the option.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes whole numbers by comma, e.g. 8,16; not {text!r}") from None


def _frames_per_second(model: str) -> float:
    """Frames per second that the model's processor samples: scenes must last long enough for the largest number."""
    from transformers import AutoVideoProcessor

    return float(AutoVideoProcessor.from_pretrained(models.resolve(model)).fps)
