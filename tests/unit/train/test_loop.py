"""What a run keeps of its own between a stop and going on."""

from pathlib import Path

import pytest
import torch

from f2l_vllm.train.loop import Loop, Loss, Stage
from f2l_vllm.train.optimizer import MuonAdamW
from f2l_vllm.train.steps import Randomness


def run(folder: Path, notes: dict[str, str], stop_after: float = 2.0, **options: object) -> None:
    """Three steps, each of which notes its number; stopped once more than a part of them is done."""
    module = torch.nn.Linear(2, 1)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.zeros_(module.bias)

    def step_loss(randomness: Randomness, step: int) -> Loss:
        notes[f"step {step}"] = "taken"
        return Loss(module(torch.ones(2)).square().mean())

    def progress(stage: str, done: float) -> None:
        if done > stop_after:
            raise KeyboardInterrupt

    loop = Loop(folder, device=torch.device("cpu"), save_seconds=0.0, on_progress=progress)
    optimizer = MuonAdamW(module.named_parameters(), muon_lr=None, adamw_lr=0.1)
    loop.run(Stage("lines", module, optimizer, step_loss, 3, lambda *_: 1.0, **options), notes)


def test_notes_of_the_steps_before_a_stop_are_there_in_the_end(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {}, stop_after=0.5)
    notes: dict[str, str] = {}
    run(tmp_path, notes)
    assert notes == {f"step {step}": "taken" for step in range(3)}


def test_what_differs_from_the_kept_run_is_named_on_either_side(tmp_path):
    run(tmp_path, {}, identity={"rate": 0.1, "tables": (1, 2)})
    run(tmp_path, {}, identity={"rate": 0.1, "tables": (1, 2)})
    for other, names in (({"rate": 0.2, "tables": (1, 2)}, "rate"), ({"rate": 0.1}, "tables"), ({}, "rate, tables")):
        with pytest.raises(ValueError, match=rf"\(other {names}\)"):
            run(tmp_path, {}, identity=other)
