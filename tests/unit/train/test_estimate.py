"""The memory that a run is said to need is what autograd keeps, and what weights and optimizer take."""

import random
from dataclasses import replace
from itertools import chain

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from f2l_vllm import models
from f2l_vllm.base_models.text_layers import module_sizes
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.train.estimate import estimate
from f2l_vllm.train.lessons import Lessons
from f2l_vllm.train.loop import Loop
from f2l_vllm.train.options import TrainingOptions
from f2l_vllm.train.trainer import Trainer
from f2l_vllm.video.sample import Sampling
from tests.support.training import filmed_examples, new_hypernetwork

WITHIN = 1.3  # times too much or too little


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return filmed_examples(tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize(
    ("videos", "frames", "options", "wider"),
    [
        (1, 4, TrainingOptions(), False),
        (3, 8, TrainingOptions(chunks=(2,)), False),
        (2, 16, TrainingOptions(precision="bf16"), False),
        (2, 8, TrainingOptions(kl=0.5, questions=2), False),
        (2, 8, TrainingOptions(), True),
    ],
)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_keeps(examples, videos, frames, options, wider, held):
    directory = models.resolve("f2l-tiny")
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=held)
    trainer = Trainer(model, AutoProcessor.from_pretrained(directory), new_hypernetwork(model), Loop())
    if wider:
        sizes = module_sizes(model, ["down_proj", "q_proj"])
        trainer.hyper = Hypernetwork(replace(trainer.hyper.config, modules=sizes, latent_size=64, num_blocks=3, rank=8))
    asked, sampling = {"chunks": options.chunks, "questions": options.questions}, Sampling(max_frames=frames)
    lessons = Lessons(examples, trainer.processor, sampling=sampling, **asked)
    some = lessons.take(0, videos, random.Random(0), random.Random(0))
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {w.untyped_storage().data_ptr() for w in chain(trainer.hyper.parameters(), model.parameters())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.loss(some, options)
    measured = sum(storage.nbytes() for storage in kept.values())
    memory = estimate(
        model, trainer.hyper, trainer.part(some), bf16=options.precision == "bf16", muon=False, teacher=options.kl > 0
    )
    assert measured / WITHIN < memory.activations < measured * WITHIN


def test_weights_gradients_and_states_are_counted(examples):
    model = AutoModelForImageTextToText.from_pretrained(models.resolve("f2l-tiny"), dtype=torch.float32)
    trainer = Trainer(model, AutoProcessor.from_pretrained(models.resolve("f2l-tiny")), new_hypernetwork(model), Loop())
    lessons = Lessons(examples, trainer.processor, sampling=Sampling(max_frames=2))
    part = trainer.part(lessons.take(0, 1, random.Random(0), random.Random(0)))
    memory = estimate(model, trainer.hyper, part, bf16=False, muon=False, teacher=False)
    optimizer = torch.optim.AdamW(trainer.hyper.parameters())
    for parameter in trainer.hyper.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert memory.optimizer == pytest.approx(sum(value.nbytes for value in states), rel=0.01)
    assert memory.gradients == memory.hypernetwork == sum(p.nbytes for p in trainer.hyper.parameters())
    assert memory.model == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.total > memory.activations + memory.optimizer


def test_a_run_is_told_what_its_largest_part_needs(examples):
    model = AutoModelForImageTextToText.from_pretrained(models.resolve("f2l-tiny"), dtype=torch.float32)
    trainer = Trainer(model, AutoProcessor.from_pretrained(models.resolve("f2l-tiny")), new_hypernetwork(model), Loop())
    small = trainer.memory(examples, TrainingOptions(videos=4, accumulate=4, frames=(2,)))
    mixed = trainer.memory(examples, TrainingOptions(videos=4, accumulate=2, frames=(2, 8), chunks=(1, 2)))
    assert mixed.activations > 3 * small.activations
    assert mixed.total - small.total == mixed.activations + mixed.features - small.activations - small.features
    again = trainer.memory(
        examples, TrainingOptions(videos=4, accumulate=2, frames=(2, 8), chunks=(1, 2), recompute=True)
    )
    assert again.reading < mixed.reading / 3
    assert again.total - again.reading == mixed.total - mixed.reading
