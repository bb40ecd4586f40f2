"""Training steps that survive a kill, on one process or several; every stage runs through `Loop.run`.

A step's random draws depend only on the seed, the stage, the step and the process, and the state is saved every minute.
A restarted run therefore goes on from its last checkpoint and takes the steps it would have taken. Several processes,
started by `torchrun` or `accelerate launch`, each draw their own part of a step's videos and share their gradients.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, nn

from f2l_vllm.files import sync, write_whole
from f2l_vllm.hypernetwork.weights import digest
from f2l_vllm.train.folder import LOG_FILE
from f2l_vllm.train.optimizer import MuonAdamW
from f2l_vllm.train.pace import MEASURED, Pace
from f2l_vllm.train.sharing import Sharing
from f2l_vllm.train.steps import Losses, Progress, Randomness, report
from f2l_vllm.train.validation import Validation

LOG_EVERY = 10  # steps
# Called with a stage's name, how many of its steps are done and how many it has, and the figures of the last one.
OnLog = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Loss:
    """The loss of the videos that a process computes at once.

    Attributes:
        mean: the loss to learn from.
        figures: for the log.
        weight: of this mean among the step's parts: its number of tokens if a step should learn the same however it is
            cut into parts, 1 if parts count alike.
        tokens: that were read for it, of videos and of text; 0 if nobody counts them.
    """

    mean: Tensor
    figures: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    tokens: int = 0


@dataclass(frozen=True)
class Stage:
    """What is trained, and how long.

    Attributes:
        module: holds everything that is trained.
        step_loss: returns the loss of this process's videos, given a step's random sources and its number.
        schedule: returns the factor on the learning rates, given a step and the number of steps.
        accumulate: losses per step and process; they and those of the other processes are averaged by weight.
        identity: what else the steps depend on, by name, in plain types; a different identity is a different run.
        validation: taken during the stage; it goes on with the run, too.
    """

    name: str
    module: nn.Module
    optimizer: MuonAdamW
    step_loss: Callable[[Randomness, int], Loss]
    steps: int
    schedule: Callable[[int, int], float]
    accumulate: int = 1
    identity: Mapping[str, Any] = field(default_factory=dict)
    validation: Validation | None = None


class _Sums(NamedTuple):
    """Of the parts of a step: losses times weights, weights, tokens."""

    loss: float = 0.0
    weight: float = 0.0
    tokens: float = 0.0


class Loop:
    """Runs stages one after the other.

    Args:
        folder: keeps one checkpoint per stage and `log.jsonl`; None keeps nothing.
        seed: of all random draws.
        device: where the loss is computed; None for this process's GPU, or the CPU.
        save_seconds: time between checkpoints.
        on_progress: called with a stage's name and how much of it is done, from 0 to 1.
        on_log: called in the main process with every line of the log.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        seed: int = 0,
        device: torch.device | None = None,
        save_seconds: float = 60.0,
        on_progress: Progress | None = None,
        on_log: OnLog | None = None,
    ) -> None:
        self.seed = seed
        self.on_progress = on_progress
        self.on_log = on_log
        on_cpu = not torch.cuda.is_available() if device is None else device.type == "cpu"
        self._processes = PartialState(cpu=on_cpu)
        self.device: torch.device = device or self._processes.device
        self._save_seconds = save_seconds
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def processes(self) -> int:
        """How many processes share a step."""
        return self._processes.num_processes

    @property
    def process(self) -> int:
        """This process's number, from 0."""
        return self._processes.process_index

    @property
    def is_main(self) -> bool:
        """True in the process that writes files and reports progress."""
        return bool(self._processes.is_main_process)

    def share(self, count: int) -> int:
        """How many of a step's `count` videos each process takes, rounded; at least one."""
        return max(1, round(count / self.processes))

    def wait(self) -> None:
        """Return when every process has called this."""
        self._processes.wait_for_everyone()

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of all processes' `numbers`; every process has to call it."""
        if self.processes == 1:
            return numbers
        return reduce(numbers.to(self.device), reduction="sum").to(numbers.device)

    def run(self, stage: Stage, notes: dict[str, str] | None = None) -> dict[str, float]:
        """Train until all steps of a stage are done, counting those of an earlier run that was stopped.

        Args:
            notes: entries that a process adds are saved in the checkpoint and restored from it; in the end it holds the
                notes of all processes.

        Returns:
            The first loss, the last smoothed loss, and the CPU seconds of this process.

        Raises:
            ValueError: the folder holds the checkpoint of another run; the message names what is different.
        """
        notes = {} if notes is None else notes
        run: dict[str, Any] = {
            "seed": self.seed,
            "steps": stage.steps,
            "processes": self.processes,
            "accumulate": stage.accumulate,
            "start": digest(stage.module.state_dict()),
            **stage.identity,
        }
        path = None if self._folder is None else self._folder / f"{stage.name}.ckpt"
        losses, first, cpu_seconds = Losses(), 0, 0.0
        if path is not None and path.exists():
            kept = _read(path, run)
            stage.module.load_state_dict(kept["module"])
            stage.optimizer.load_state_dict(kept["optimizer"])
            losses, first, cpu_seconds = Losses(*kept["losses"]), kept["step"], kept["cpu_seconds"]
            notes |= kept.get("notes", {})
            if stage.validation is not None:
                stage.validation.load_state_dict(kept["validation"])
        self._cut_log(stage.name, first)
        self.wait()  # a late process must not find a checkpoint that another one writes from here on
        if stage.validation is not None and not stage.validation.losses:
            stage.validation.take(0, stage.module)
        stage.module.train()
        started, saved = time.process_time() - cpu_seconds, time.monotonic()
        pace = Pace(self.device, first)
        sharing = Sharing(stage.optimizer.parameters) if self.processes > 1 else None
        for step in range(first, stage.steps):
            sums, figures = self._losses(stage, step, sharing)
            late = path is not None and self.is_main and time.monotonic() - saved > self._save_seconds
            total, late, tokens = self._average(stage.optimizer, sums, late, sharing)
            pace.add(tokens)
            to_keep = late or step == stage.steps - 1
            if to_keep:
                self._gather(notes)
            factor = stage.schedule(step, stage.steps)
            norm = stage.optimizer.step(factor)
            losses.add(total)
            figures = {"loss": total, "smoothed": losses.smoothed, **figures, "norm": norm, "factor": factor}
            if stage.validation is not None and stage.validation.is_due(step + 1, stage.steps):
                figures["validation"] = stage.validation.take(step + 1, stage.module)
            if self.is_main:
                if step % LOG_EVERY == 0 or step == stage.steps - 1 or "validation" in figures:
                    figures |= pace.figures(step + 1, stage.steps)
                    figures["cpu_seconds"] = round(time.process_time() - started, 1)
                    self._log(stage, step + 1, figures)
                report(self.on_progress, stage.name, step, stage.steps, figures)
                if path is not None and to_keep:
                    kept = {
                        "run": run,
                        "step": step + 1,
                        "losses": [losses.first, losses.smoothed, losses.count],
                        "cpu_seconds": time.process_time() - started,
                        "notes": dict(notes),
                        "module": stage.module.state_dict(),
                        "optimizer": stage.optimizer.state_dict(),
                        "validation": None if stage.validation is None else stage.validation.state_dict(),
                    }
                    _save(kept, path)
                    saved = time.monotonic()
        stage.module.eval()
        result = {"steps": stage.steps, "cpu_seconds": round(time.process_time() - started, 1), **losses.summary()}
        if self.processes > 1:
            result = broadcast_object_list([result])[0]
        return result

    def _losses(self, stage: Stage, step: int, sharing: Sharing | None) -> tuple[_Sums, dict[str, float]]:
        """Add up the gradients of a step's parts; this process's sums, and the last figures."""
        sums, figures = _Sums(), dict[str, float]()
        stage.optimizer.zero_grad()
        for part in range(stage.accumulate):
            randomness = Randomness.of_part(stage.name, step, part, stage.accumulate, self.seed, self.process)
            loss = stage.step_loss(randomness, step)
            share = loss.weight if stage.accumulate * self.processes > 1 else 1.0  # a single mean needs no weight
            if sharing is not None and part == stage.accumulate - 1:
                sharing.begin()
            (loss.mean * share).backward()
            sums = _Sums(sums.loss + loss.mean.item() * share, sums.weight + share, sums.tokens + loss.tokens)
            figures = loss.figures
        return sums, figures

    def _average(
        self, optimizer: MuonAdamW, own: _Sums, late: bool, sharing: Sharing | None
    ) -> tuple[float, bool, float]:
        """Turn the sums over all processes into weighted means: the gradients in place, the loss returned.

        Args:
            own: this process's sums.
            late: whether it is time for a checkpoint by this process's clock.
            sharing: with the other processes; its last backward pass has begun to sum the gradients.

        Returns:
            The mean loss, whether it is time for a checkpoint by any process's clock, and the tokens of all.
        """
        total, weight, tokens = own
        if sharing is not None:
            total, weight, tokens, late = sharing.finish(torch.tensor([*own, late], device=self.device)).tolist()
        for parameter in optimizer.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(weight)
        return total / weight, bool(late), tokens

    def _gather(self, notes: dict[str, str]) -> None:
        """Give every process the notes of all; every process has to call it."""
        if self.processes > 1:
            for others in gather_object([notes]):
                notes |= others

    def _log(self, stage: Stage, step: int, figures: dict[str, float]) -> None:
        if self._folder is not None:
            kept = {name: value if name in MEASURED else round(value, 6) for name, value in figures.items()}
            with (self._folder / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage.name, "step": step, **kept}) + "\n")
        if self.on_log is not None:
            self.on_log(stage.name, step, stage.steps, figures)

    def _cut_log(self, stage: str, step: int) -> None:
        """Forget what a stopped run logged after its last checkpoint: those steps are taken again."""
        if self._folder is None or not self.is_main or not (self._folder / LOG_FILE).exists():
            return
        kept = []
        for text in (self._folder / LOG_FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed run may be half a line
                line = json.loads(text)
                if line["stage"] != stage or line["step"] <= step:
                    kept.append(text)
        write_whole(self._folder / LOG_FILE, "".join(f"{text}\n" for text in kept))


def _read(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint of this run. Raises ValueError if it is another's."""
    kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if kept["run"] != run:
        names = dict.fromkeys((*run, *kept["run"]))
        different = [name for name in names if kept["run"].get(name) != run.get(name)]
        raise ValueError(
            f"{path} belongs to another run (other {', '.join(different)}). Continue it with the options it was "
            "started with, or choose another folder."
        )
    return kept


def _save(kept: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".part")  # one name: the next checkpoint replaces what a killed run left
    torch.save(kept, partial)
    sync(partial)
    partial.replace(path)
