"""The time that a run is said to take rests on the operations that torch counts."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from f2l_vllm import models
from f2l_vllm.base_models.text_layers import module_sizes
from f2l_vllm.cli.training import _lasting
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.train.forecast import Forecast, forecast
from f2l_vllm.train.lessons import Lessons
from f2l_vllm.train.loop import Loop
from f2l_vllm.train.options import TrainingOptions
from f2l_vllm.train.steps import Randomness
from f2l_vllm.train.trainer import Trainer
from f2l_vllm.train.work import work_of
from f2l_vllm.video.sample import Sampling
from tests.support.training import filmed_examples, new_hypernetwork

WITHIN = 1.1  # times too much or too little


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return filmed_examples(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def trainer() -> Trainer:
    directory = models.resolve("f2l-tiny")
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    return Trainer(model, AutoProcessor.from_pretrained(directory), new_hypernetwork(model), Loop())


@pytest.mark.parametrize(
    ("videos", "frames", "options", "wider"),
    [
        (1, 4, TrainingOptions(), False),
        (3, 8, TrainingOptions(chunks=(2,)), False),
        (2, 12, TrainingOptions(precision="bf16"), False),
        (2, 8, TrainingOptions(kl=0.5, questions=2), False),
        (2, 8, TrainingOptions(), True),
        (2, 8, TrainingOptions(recompute=True, chunks=(2,)), True),
    ],
)
def test_the_operations_are_those_that_torch_counts(trainer, examples, videos, frames, options, wider) -> None:
    if wider:
        sizes = module_sizes(trainer.model, ["down_proj", "q_proj"])
        shape = {"modules": sizes, "latent_size": 64, "num_blocks": 2, "num_self_attn_per_block": 1, "rank": 8}
        trainer.hyper = Hypernetwork(replace(trainer.hyper.config, **shape))
    asked, sampling = {"chunks": options.chunks, "questions": options.questions}, Sampling(max_frames=frames)
    lessons = Lessons(examples, trainer.processor, sampling=sampling, **asked)
    chosen = Randomness.of("test", 0)
    some = lessons.take(0, videos, chosen.shared, chosen.rng)
    # The CPU's fused attention is one of those that the counter passes over.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trainer.loss(some, options).mean.backward()
    counted = counter.get_total_flops()
    part = trainer.part(some)
    work = work_of(trainer.model, trainer.hyper.config, part, teacher=options.kl > 0, recompute=options.recompute)
    assert counted / WITHIN < work.total < counted * WITHIN


def test_a_forecast_scales_one_video_to_the_steps_of_the_run(trainer, examples) -> None:
    small = forecast(trainer, examples, TrainingOptions(videos=1, frames=(4,), epochs=2.0), 0)
    large = forecast(trainer, examples, TrainingOptions(videos=6, accumulate=3, frames=(4,), steps=10), 0)
    assert (small.steps, large.steps) == (8, 10)
    assert large.operations == 6 * small.operations
    mixed = forecast(trainer, examples, TrainingOptions(videos=1, frames=(4, 12), steps=1), 0)
    more = forecast(trainer, examples, TrainingOptions(videos=1, frames=(12,), steps=1), 0)
    assert 2 * mixed.operations == small.operations + more.operations


def test_a_forecast_leaves_the_hypernetwork_as_it_is(trainer, examples) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.hyper.state_dict().items()}
    forecast(trainer, examples, TrainingOptions(videos=2, frames=(4,)), 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.hyper.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.hyper.parameters())


def test_workers_decode_while_the_device_computes() -> None:
    alone = Forecast(steps=3600, operations=6e12, rate=2e12, decoding=8.0, workers=0)
    assert (alone.step_seconds, alone.seconds / 3600) == (11.0, 11.0)
    assert replace(alone, workers=2).step_seconds == 4.0
    assert replace(alone, workers=8).step_seconds == 3.0
    assert "A step takes about 11 s, 3,600 steps about 11 hours in all" in _lasting(alone)
