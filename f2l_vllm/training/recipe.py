"""From nothing to the default model: `make_model` runs the stages, keeps each one's result, and scores the whole.

A run that is stopped goes on with the first stage that has no result yet; inside a stage nothing is kept. The same
seed on the same machine and versions gives the same model.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.training import hypernetwork_stage, stages, vision_stage
from f2l_vllm.training.checkpoint import build_model, build_processor, save_checkpoint
from f2l_vllm.training.score import score_model
from f2l_vllm.training.vlm_stage import FIRST, REFINEMENT, train_vlm

MODEL_NAME = "f2l-tiny"
REPORT_FILE = "training.json"
STEPS = {vision_stage.NAME: 600, FIRST.name: 1300, REFINEMENT.name: 500, hypernetwork_stage.NAME: 600}
FULL_MINUTES = 40.0  # of one quiet core, for STEPS
_STAGES_FOLDER = ".stages"
_log = logging.getLogger(__name__)


def make_model(
    output_dir: str | Path,
    *,
    seed: int = 0,
    minutes: float | None = None,
    scale: float = 1.0,
    score_videos: int = 64,
    on_progress: stages.Progress | None = None,
) -> dict[str, Any]:
    """Train the default model and its hypernetwork from nothing on one CPU thread, and write them to a directory.

    Args:
        output_dir: becomes a model directory with a `hypernetwork` folder; an unfinished run in it is continued.
        minutes: about how long training may take on a quiet core; None for the full recipe. Replaces `scale`.
        scale: factor on every stage's steps.
        score_videos: mp4 files written, internalized and asked about in the end; 0 leaves the scores out.
        on_progress: called with a stage's name and how much of it is done, from 0 to 1.

    Returns:
        Steps, CPU seconds and last loss of every stage, sizes in bytes, and the scores of `score_model`; the same is
        written to `training.json`.

    Raises:
        ValueError: a budget that leaves no step to train.
    """
    scale = scale if minutes is None else minutes / FULL_MINUTES
    if not scale > 0:
        raise ValueError("training needs a positive number of minutes (or scale)")
    steps = {name: max(1, round(count * scale)) for name, count in STEPS.items()}
    output_dir = Path(output_dir)
    results: dict[str, dict[str, float]] = {}
    with stages.one_thread():
        processor = build_processor()
        model = build_model(processor, seed=seed)
        run = _Run(output_dir / _STAGES_FOLDER, seed, steps, results)
        shared: dict[str, Any] = {"seed": seed, "on_progress": on_progress}
        run.stage(vision_stage.NAME, model, partial(vision_stage.train_vision, model, processor, **shared))
        for course in (FIRST, REFINEMENT):
            run.stage(course.name, model, partial(train_vlm, model, processor, course=course, **shared))
        _round_to_bf16(model)  # the hypernetwork is trained for the weights that are shipped
        hypernetwork = hypernetwork_stage.build_hypernetwork(model, MODEL_NAME, seed=seed)
        train = partial(hypernetwork_stage.train_hypernetwork, hypernetwork, model, processor, **shared)
        run.stage(hypernetwork_stage.NAME, hypernetwork, train)
        save_checkpoint(output_dir, processor, model)
        save_hypernetwork(hypernetwork, output_dir / "hypernetwork")
        report: dict[str, Any] = {"seed": seed, "stages": results, "bytes": _sizes(output_dir)}
        if score_videos:
            report["scores"] = score_model(output_dir, videos=score_videos, on_progress=on_progress)
    (output_dir / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(output_dir / _STAGES_FOLDER)
    return report


def save_hypernetwork(hypernetwork: Hypernetwork, directory: Path) -> None:
    """Write a hypernetwork in bf16, in place of one that is there."""
    hypernetwork.save(directory, torch.bfloat16, overwrite=True)


class _Run:
    """The stages of one run: their results on disk, and what they cost."""

    def __init__(self, folder: Path, seed: int, steps: dict[str, int], results: dict[str, dict[str, float]]) -> None:
        self.folder, self.seed, self.steps, self.results = folder, seed, steps, results
        folder.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str, module: nn.Module, train: Callable[..., dict[str, float]]) -> None:
        """Load the stage's result into the module if there is one of this very run, else train and keep it."""
        path = self.folder / f"{name}.safetensors"
        wanted = {"seed": self.seed, "steps": [self.steps[stage] for stage in (*self.results, name)]}
        if path.exists():
            with safe_open(path, "pt") as file:
                kept = json.loads((file.metadata() or {}).get("run", "{}"))
            if {key: kept.get(key) for key in wanted} == wanted:
                _log.info("stage %s: continuing from %s", name, path)
                module.load_state_dict(load_file(path))
                self.results[name] = kept["result"]
                return
        started = time.process_time()
        losses = train(steps=self.steps[name])
        cpu_seconds = round(time.process_time() - started, 1)
        self.results[name] = {"steps": self.steps[name], "cpu_seconds": cpu_seconds, **losses}
        run = json.dumps({**wanted, "result": self.results[name]})
        partial = path.with_suffix(".part")
        save_file(_own_memory(module.state_dict()), partial, metadata={"format": "pt", "run": run})
        partial.replace(path)
        _log.info("stage %s: %d steps in %.0f CPU seconds", name, self.steps[name], cpu_seconds)


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies: safetensors refuses tensors that share memory, as tied embeddings do."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _round_to_bf16(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.copy_(parameter.bfloat16().float())


def _sizes(directory: Path) -> dict[str, int]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and _STAGES_FOLDER not in path.parts]
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}
