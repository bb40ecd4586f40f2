"""What a run keeps of its own between a stop and going on."""

import json
from pathlib import Path

import pytest
import torch

from f2l_vllm.train.folder import LOG_FILE
from f2l_vllm.train.loop import Loop, Loss, Stage
from f2l_vllm.train.optimizer import MuonAdamW
from f2l_vllm.train.steps import Randomness
from f2l_vllm.train.validation import Validation


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


def validated_run(folder: Path, stop_after: float = 2.0, save_seconds: float = 0.0) -> tuple[Validation, torch.Tensor]:
    """Eight steps that pass the best weights on their way; stopped once more than a part of them is done."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 2.0)

    def progress(stage: str, done: float) -> None:
        if done > stop_after:
            raise KeyboardInterrupt

    def distance() -> float:
        assert not module.training
        return abs(module.weight.item() - 1.3)

    def step_loss(randomness: Randomness, step: int) -> Loss:
        assert module.training
        return Loss(module(torch.ones(1)).square().mean())

    validation = Validation(distance, 3, keep_best=True)
    loop = Loop(folder, device=torch.device("cpu"), save_seconds=save_seconds, on_progress=progress)
    optimizer = MuonAdamW(module.named_parameters(), muon_lr=None, adamw_lr=0.2, weight_decay=0.0)
    loop.run(Stage("lines", module, optimizer, step_loss, 8, lambda *_: 1.0, validation=validation))
    return validation, module.weight.detach().clone()


def test_validation_keeps_the_weights_of_the_lowest_loss_and_the_run_ends_with_the_last(tmp_path):
    validation, last = validated_run(tmp_path)
    assert list(validation.losses) == [0, 3, 6, 8], "before, every third step, and after the last"
    assert validation.best_step == 3
    assert validation.best is not None
    assert abs(validation.best["weight"].item() - 1.3) == validation.losses[3]
    assert abs(last.item() - 1.3) == validation.losses[8]
    logged = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert {line["step"]: line["validation"] for line in logged if "validation" in line} == {
        step: pytest.approx(validation.losses[step], abs=1e-6) for step in (3, 6, 8)
    }


@pytest.mark.parametrize("stop_after", [0.2, 0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("save_seconds", [0.0, 100.0])
def test_a_stopped_run_goes_on_with_its_validations(tmp_path, stop_after, save_seconds):
    whole, last = validated_run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        validated_run(tmp_path / "stopped", stop_after - 0.01, save_seconds)
    resumed, resumed_last = validated_run(tmp_path / "stopped", save_seconds=save_seconds)
    assert (resumed.losses, resumed.best_step) == (whole.losses, whole.best_step)
    assert whole.best is not None
    assert resumed.best is not None
    assert torch.equal(resumed.best["weight"], whole.best["weight"])
    assert torch.equal(resumed_last, last)


def test_a_loss_that_is_no_number_is_never_the_best():
    losses = iter([float("nan"), 2.0, float("nan"), 3.0])
    validation = Validation(lambda: next(losses), 1)
    for step in range(4):
        validation.take(step, torch.nn.Linear(1, 1))
    assert validation.best_step == 1
    with pytest.raises(ValueError, match="positive number"):
        Validation(lambda: 0.0, 0)
