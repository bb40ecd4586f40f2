"""Every stage learns: a few steps reduce its loss. And the optimizer behind them does what it says."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import f2l_vllm.train.loop as train_loop
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.recipes.f2l_tiny import hypernetwork_stage, recipe, vision_stage, vlm_stage
from f2l_vllm.recipes.f2l_tiny.checkpoint import build_model, build_processor
from f2l_vllm.train.loop import LOG_FILE, Loop
from f2l_vllm.train.optimizer import MuonAdamW, warm_constant_linear, warm_cosine
from f2l_vllm.train.pace import MEASURED
from tests.support import ROOT


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_a_few_steps_of_vision_reduce_its_loss(processor, monkeypatch):
    monkeypatch.setattr(vision_stage, "_SCENES", 16)
    done: list[float] = []
    loop = Loop(on_progress=lambda stage, part: done.append(part))
    losses = vision_stage.train_vision(build_model(processor), processor, loop, steps=12)
    assert losses["loss"] < 0.95 * losses["first_loss"]
    assert done == [(step + 1) / 12 for step in range(12)]


def test_a_few_steps_of_the_model_reduce_its_loss(processor, monkeypatch):
    monkeypatch.setattr(vlm_stage, "BATCH", 8)
    losses = vlm_stage.train_vlm(build_model(processor), processor, Loop(), steps=8)
    assert losses["loss"] < 0.97 * losses["first_loss"]


def test_a_few_steps_of_the_hypernetwork_reduce_its_loss_and_leave_the_model_alone(processor, monkeypatch):
    monkeypatch.setattr(vlm_stage, "BATCH", 8)
    monkeypatch.setattr(hypernetwork_stage, "BATCH", 8)
    model = build_model(processor)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hypernetwork = hypernetwork_stage.build_hypernetwork(model, "tiny", seed=0)
    losses = hypernetwork_stage.train_hypernetwork(hypernetwork, model, processor, Loop(), steps=8)
    assert losses["loss"] < 0.97 * losses["first_loss"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_untrained_hypernetwork_changes_nothing(processor):
    model = build_model(processor)
    hypernetwork = hypernetwork_stage.build_hypernetwork(model, "tiny", seed=0)
    factors = hypernetwork.combine([hypernetwork(torch.randn(2, 4, 5, 128))])
    a, b = factors["down_proj"]
    assert torch.count_nonzero(b) == 0
    assert torch.count_nonzero(a) > 0


def test_another_seed_does_not_go_on_with_this_ones_run(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(vision_stage, "_SCENES", 2)
    vision_stage.train_vision(build_model(processor), processor, Loop(tmp_path, seed=0), steps=2)
    with pytest.raises(ValueError, match=r"another run \(other seed"):
        vision_stage.train_vision(build_model(processor), processor, Loop(tmp_path, seed=1), steps=2)


SHORT_RUN = """
import os, signal, sys
from pathlib import Path
from f2l_vllm import torch_shims
torch_shims.install()
from tests.e2e.recipes.test_stages import shortened
shortened(setattr)
from f2l_vllm.recipes.f2l_tiny import recipe

def end(stage, part):
    if stage == sys.argv[2] and part > 0.5:
        os.kill(os.getpid(), signal.SIGKILL)

recipe.make_model(Path(sys.argv[1]), score_scenes=0, on_progress=end)
"""
STEPS = {"vision": 3, "vlm": 8, "refinement": 2, "hypernetwork": 2}


def shortened(patch: Callable[[Any, str, object], None]) -> None:
    """Few steps of few scenes; a checkpoint after each, and a line in the log."""
    for module, name, value in (
        (recipe, "STEPS", STEPS),
        (recipe, "Loop", partial(Loop, save_seconds=0.0)),
        (train_loop, "LOG_EVERY", 1),
        (vision_stage, "_SCENES", 4),
        (vlm_stage, "BATCH", 2),
        (hypernetwork_stage, "BATCH", 2),
    ):
        patch(module, name, value)


def short_run(folder: Path, *launch: str, killed_in: str = "") -> int:
    """The exit code of a run in a process of its own."""
    script = folder.parent / "short_run.py"
    script.write_text(SHORT_RUN)
    command = [sys.executable, *launch, str(script), str(folder), killed_in]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, timeout=600).returncode


def curve(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def test_a_killed_run_goes_on_and_takes_the_steps_it_would_have_taken(tmp_path, monkeypatch):
    shortened(monkeypatch.setattr)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    recipe.make_model(unbroken, score_scenes=0)
    assert short_run(killed, killed_in="vlm") == -signal.SIGKILL
    step = torch.load(killed / ".stages" / "vlm.ckpt", weights_only=True)["step"]
    assert 0 < step < STEPS["vlm"], "killed in the middle of a stage"
    trained: list[str] = []
    report = recipe.make_model(killed, score_scenes=0, on_progress=lambda stage, _: trained.append(stage))
    assert Counter(trained) == Counter({**STEPS, "vision": 0, "vlm": STEPS["vlm"] - step})  # from where it was
    assert curve(killed) == curve(unbroken)
    for name in ("model.safetensors", "hypernetwork/model.safetensors"):
        assert (killed / name).read_bytes() == (unbroken / name).read_bytes()
    assert list(report["stages"]) == list(STEPS)
    assert json.loads((killed / "training.json").read_text()) == report
    made = Hypernetwork.load(killed / "hypernetwork", dtype=None)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert not (killed / ".stages").exists()


def test_two_processes_share_the_steps_and_agree(tmp_path):
    folder = tmp_path / "model"
    assert short_run(folder, "-m", "torch.distributed.run", "--nproc-per-node", "2") == 0
    report = json.loads((folder / "training.json").read_text())
    assert report["processes"] == 2
    assert [line["step"] for line in curve(folder) if line["stage"] == "vlm"] == list(range(1, STEPS["vlm"] + 1))


@pytest.mark.parametrize("budget", [{"minutes": 0}, {"scale": -1.0}])
def test_a_budget_without_a_step_is_refused(tmp_path, budget):
    with pytest.raises(ValueError, match="positive"):
        recipe.make_model(tmp_path, **budget)


def test_stacked_matrices_are_updated_like_single_ones():
    torch.manual_seed(0)
    stacked, target = torch.nn.Parameter(torch.randn(3, 6, 4)), torch.randn(3, 6, 4)
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in stacked.detach()]
    scalar = torch.nn.Parameter(torch.zeros(1))
    together = MuonAdamW([("head", stacked), ("scaler", scalar)], muon_lr=0.05, adamw_lr=0.1, clip=1e9)
    apart = MuonAdamW([*((str(i), p) for i, p in enumerate(singles)), ("scaler", scalar)], muon_lr=0.05, adamw_lr=0.1)
    apart.clip = 1e9
    for _ in range(3):
        for optimizer in (together, apart):
            optimizer.zero_grad()
        (stacked - target).square().sum().backward()
        sum((single - goal).square().sum() for single, goal in zip(singles, target, strict=True)).backward()
        for optimizer in (together, apart):
            optimizer.step(1.0)
    torch.testing.assert_close(stacked.detach(), torch.stack([single.detach() for single in singles]))


def test_the_schedule_warms_up_holds_and_ends_near_zero():
    factors = [warm_constant_linear(step, 200, warmup=10) for step in range(200)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:100] == [1.0] * 91
    assert factors[150] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.02)


def test_the_cosine_warms_up_and_ends_near_zero():
    factors = [warm_cosine(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 30)
    assert factors[29:31] == [1.0, 1.0]
    assert factors[515] == pytest.approx(0.5, abs=0.01)
    assert factors[-1] < 1e-4
