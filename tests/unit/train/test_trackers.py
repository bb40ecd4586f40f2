"""The figures of a run reach the trackers that were asked for, once each, however often the run was stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from typer.testing import CliRunner

from f2l_vllm.cli.main import app
from f2l_vllm.train.folder import LOG_FILE
from f2l_vllm.train.loop import Loop, Loss, Stage
from f2l_vllm.train.optimizer import MuonAdamW
from f2l_vllm.train.trackers import PACKAGES, Trackers, check_trackers
from f2l_vllm.train.validation import Validation


class Lines(GeneralTracker):
    """A tracker as accelerate lets anybody write one: a JSON line for everything that it is told."""

    name = "lines"
    requires_logging_directory = True

    def __init__(self, run: str, folder: Path) -> None:
        super().__init__()
        self.path = folder / f"{run}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def tracker(self) -> Path:
        return self.path

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._write({"options": values})

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._write({"step": step, **values})

    def finish(self) -> None:
        self._write({"finished": True})


@pytest.fixture
def lines() -> Iterator[str]:
    LOGGER_TYPE_TO_CLASS[Lines.name] = Lines
    yield Lines.name
    del LOGGER_TYPE_TO_CLASS[Lines.name]


def run(folder: Path, name: str, stop_after: float = 2.0, save_seconds: float = 0.0) -> None:
    """25 steps, three of which are logged anyway and two more because the validation loss is taken."""
    module = torch.nn.Linear(1, 1)

    def progress(stage: str, done: float) -> None:
        if done > stop_after:
            raise KeyboardInterrupt

    loop = Loop(folder / ".run", device=torch.device("cpu"), save_seconds=save_seconds)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.zeros_(module.bias)
    loop.on_progress = progress
    optimizer = MuonAdamW(module.named_parameters(), muon_lr=None, adamw_lr=0.1)
    validation = Validation(lambda: module.weight.item(), 8)
    stage = Stage(
        "lines",
        module,
        optimizer,
        lambda *_: Loss(module(torch.ones(1)).square().mean(), tokens=7),
        25,
        lambda *_: 1.0,
        validation=validation,
    )
    with Trackers([name], folder / ".run", folder, {"rate": 0.1, "frames": (8, 12), "model": None}) as trackers:
        loop.on_log = trackers.log
        loop.run(stage)


def test_a_tracker_is_told_what_the_log_says(tmp_path, lines):
    run(tmp_path, lines)
    (path,) = (tmp_path / "lines").iterdir()
    options, *told, end = [json.loads(line) for line in path.read_text().splitlines()]
    assert options == {"options": {"rate": 0.1, "frames": "(8, 12)", "model": "None"}}
    assert end == {"finished": True}
    logged = [json.loads(line) for line in (tmp_path / ".run" / LOG_FILE).read_text().splitlines()]
    assert [line["step"] for line in told] == [line["step"] for line in logged] == [1, 8, 11, 16, 21, 24, 25]
    for one, other in zip(told, logged, strict=True):
        assert one["lines/loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["lines/tokens_per_s"] == other["tokens_per_s"] > 0
        assert one["lines/peak_memory_mib"] > 100
        assert ("lines/validation" in one) == (one["step"] in (8, 16, 24, 25))
    assert told[-1]["lines/eta_s"] == 0.0, "nothing is left to do"


def test_a_run_that_goes_on_keeps_its_name(tmp_path, lines):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, lines, stop_after=0.5)
    run(tmp_path, lines)
    (path,) = (tmp_path / "lines").iterdir()
    lines_told = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines_told if "step" in line] == [1, 8, 11, 16, 21, 24, 25]
    assert lines_told.count({"finished": True}) == 2, "what was told before the stop is written, too"


def test_tensorboard_shows_every_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="comes with the extra 'test'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "tensorboard", stop_after=0.5, save_seconds=100.0)  # the steps are taken again
    run(tmp_path, "tensorboard")
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [json.loads(line) for line in (tmp_path / ".run" / LOG_FILE).read_text().splitlines()]
    assert {event.step: event.value for event in events.Scalars("lines/loss")} == {
        line["step"]: pytest.approx(line["loss"], abs=1e-6) for line in logged
    }
    assert [event.step for event in events.Scalars("lines/validation")] == [8, 16, 24, 25]


def test_a_tracker_that_is_not_there_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "wandb", "no_such_package")
    with pytest.raises(ValueError, match=r"needs the package no_such_package.*pip install 'f2l-vllm\[wandb\]'"):
        check_trackers(["wandb"])
    words = ["train", str(tmp_path / "run"), "--manifest", str(tmp_path / "none.jsonl"), "--log-with", "paper"]
    told = CliRunner().invoke(app, words, env={"COLUMNS": "400"})
    assert told.exit_code == 2
    assert "no tracker 'paper'; choose from tensorboard, wandb, trackio" in told.output
