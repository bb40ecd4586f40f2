"""Every stage learns: a few steps reduce its loss. And the optimizer behind them does what it says."""

import json

import pytest
import torch

from f2l_vllm.training import hypernetwork_stage, recipe, vision_stage, vlm_stage
from f2l_vllm.training.checkpoint import build_model, build_processor
from f2l_vllm.training.optimizer import MuonAdamW, warm_constant_linear


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_a_few_steps_of_vision_reduce_its_loss(processor):
    done: list[float] = []
    losses = vision_stage.train_vision(
        build_model(processor), processor, steps=12, seed=0, on_progress=lambda stage, part: done.append(part)
    )
    assert losses["loss"] < 0.95 * losses["first_loss"]
    assert done == [(step + 1) / 12 for step in range(12)]


def test_a_few_steps_of_the_model_reduce_its_loss(processor, monkeypatch):
    monkeypatch.setattr(vlm_stage, "BATCH", 8)
    losses = vlm_stage.train_vlm(build_model(processor), processor, steps=16, seed=0)
    assert losses["loss"] < 0.97 * losses["first_loss"]


def test_a_few_steps_of_the_hypernetwork_reduce_its_loss_and_leave_the_model_alone(processor, monkeypatch):
    monkeypatch.setattr(vlm_stage, "BATCH", 8)
    monkeypatch.setattr(hypernetwork_stage, "BATCH", 8)
    model = build_model(processor)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hypernetwork = hypernetwork_stage.build_hypernetwork(model, "tiny", seed=0)
    losses = hypernetwork_stage.train_hypernetwork(hypernetwork, model, processor, steps=16, seed=0)
    assert losses["loss"] < 0.97 * losses["first_loss"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_untrained_hypernetwork_changes_nothing(processor):
    model = build_model(processor)
    hypernetwork = hypernetwork_stage.build_hypernetwork(model, "tiny", seed=0)
    factors = hypernetwork.combine([hypernetwork(torch.randn(2, 4, 5, 128))])
    a, b = factors["down_proj"]
    assert torch.count_nonzero(b) == 0
    assert torch.count_nonzero(a) > 0


def test_a_stopped_run_goes_on_with_the_first_stage_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(vlm_stage, "BATCH", 4)
    monkeypatch.setattr(hypernetwork_stage, "BATCH", 4)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(hypernetwork_stage, "train_hypernetwork", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe.make_model(tmp_path, scale=0.001, score_videos=0)
    trained: list[str] = []
    report = recipe.make_model(
        tmp_path, scale=0.001, score_videos=0, on_progress=lambda stage, _: trained.append(stage)
    )
    assert set(trained) == {"hypernetwork"}
    assert list(report["stages"]) == ["vision", "vlm", "refinement", "hypernetwork"]
    assert json.loads((tmp_path / "training.json").read_text()) == report
    assert (tmp_path / "hypernetwork" / "model.safetensors").is_file()
    assert not (tmp_path / ".stages").exists()


def test_results_of_another_seed_are_not_continued(tmp_path):
    class Counter(torch.nn.Linear):
        runs = 0

        def train_it(self, *, steps):
            self.runs += 1
            return {"loss": 0.0}

    module = Counter(2, 2)
    for seed in (0, 0, 1):
        recipe._Run(tmp_path, seed, {"vision": 5}, {}).stage("vision", module, module.train_it)
    assert module.runs == 2


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
        together.step((stacked - target).square().sum(), 1.0)
        apart.step(sum((single - goal).square().sum() for single, goal in zip(singles, target, strict=True)), 1.0)
    torch.testing.assert_close(stacked.detach(), torch.stack([single.detach() for single in singles]))


def test_the_schedule_warms_up_holds_and_ends_near_zero():
    factors = [warm_constant_linear(step, 200, warmup=10) for step in range(200)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:100] == [1.0] * 91
    assert factors[150] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.02)
