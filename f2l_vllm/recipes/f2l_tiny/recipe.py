"""From nothing to the default model: `make_model` runs the stages and scores the result.

A stopped run goes on where it was (`Loop`). The same seed and number of processes on the same machine and versions
give the same model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from f2l_vllm.recipes.f2l_tiny import hypernetwork_stage, vision_stage
from f2l_vllm.recipes.f2l_tiny.checkpoint import build_model, build_processor, load_weights, save_checkpoint
from f2l_vllm.recipes.f2l_tiny.score import score_model
from f2l_vllm.recipes.f2l_tiny.vlm_stage import FIRST, REFINEMENT, train_vlm
from f2l_vllm.train import folder
from f2l_vllm.train.folder import REPORT_FILE
from f2l_vllm.train.loop import Loop
from f2l_vllm.train.steps import Progress, one_thread

MODEL_NAME = "f2l-tiny"
STEPS = {vision_stage.NAME: 800, FIRST.name: 1500, REFINEMENT.name: 500, hypernetwork_stage.NAME: 1200}
FULL_MINUTES = 37.0  # of one quiet core, for STEPS
_STAGES_FOLDER = ".stages"


def make_model(
    output_dir: str | Path,
    *,
    seed: int = 0,
    minutes: float | None = None,
    scale: float = 1.0,
    score_scenes: int = 512,
    base: str | Path | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the default model and its hypernetwork from nothing, with one CPU thread per process, and write them.

    Under `torchrun` the processes share every step.

    Args:
        output_dir: becomes a model directory with a `hypernetwork` folder; an unfinished run in it is continued.
        minutes: about how long training may take on one quiet core; None for the full recipe. Replaces `scale`.
        scale: factor on every stage's steps.
        score_scenes: number of held-out scenes for the scores; 0 leaves the scores out.
        base: a model directory written by this function; then only a hypernetwork for its model is trained.
        overwrite: start anew in a folder that holds a model or a run; without it, a folder with a model is refused.
        on_progress: called with a stage's name and how much of it is done, from 0 to 1.

    Returns:
        Steps, CPU seconds and last loss of every stage, sizes in bytes, and the scores of `score_model`.
        `training.json` holds the same, `log.jsonl` the course of every stage.

    Raises:
        ValueError: the budget leaves no step to train, or the output directory holds another run or a finished one.
    """
    scale = scale if minutes is None else minutes / FULL_MINUTES
    if not scale > 0:
        raise ValueError("training needs a positive number of minutes (or scale)")
    steps = {name: max(1, round(count * scale)) for name, count in STEPS.items()}
    output_dir = Path(output_dir)
    finished = (REPORT_FILE, "config.json", "model.safetensors", "hypernetwork")
    folder.check(output_dir, finished, run=_STAGES_FOLDER, overwrite=overwrite, extend=False)
    results: dict[str, dict[str, float]] = {}
    with one_thread():
        processor = build_processor()
        model = build_model(processor, seed=seed)
        loop = Loop(output_dir / _STAGES_FOLDER, seed=seed, device=torch.device("cpu"), on_progress=on_progress)
        if loop.is_main:
            folder.prepare(output_dir, run=_STAGES_FOLDER, overwrite=overwrite, extend=False)
        loop.wait()
        if base is None:
            results[vision_stage.NAME] = vision_stage.train_vision(
                model, processor, loop, steps=steps[vision_stage.NAME]
            )
            for course in (FIRST, REFINEMENT):
                results[course.name] = train_vlm(model, processor, loop, steps=steps[course.name], course=course)
            _round_to_bf16(model)  # the hypernetwork is trained for the weights that are shipped
        else:
            load_weights(model, Path(base) / "model.safetensors")
        hypernetwork = hypernetwork_stage.build_hypernetwork(model, MODEL_NAME, seed=seed)
        results[hypernetwork_stage.NAME] = hypernetwork_stage.train_hypernetwork(
            hypernetwork, model, processor, loop, steps=steps[hypernetwork_stage.NAME]
        )
        report: dict[str, Any] = {"seed": seed, "processes": loop.processes, "stages": results}
        if loop.is_main:
            save_checkpoint(output_dir, processor, model)
            hypernetwork.save(output_dir / "hypernetwork", torch.bfloat16, overwrite=True)
            report["bytes"] = _sizes(output_dir)
            if score_scenes:
                report["scores"] = score_model(output_dir, scenes=score_scenes)
            (output_dir / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
            folder.end(output_dir, _STAGES_FOLDER)
    return report


@torch.no_grad()
def _round_to_bf16(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.copy_(parameter.bfloat16().float())


def _sizes(directory: Path) -> dict[str, int]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and _STAGES_FOLDER not in path.parts]
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}
