"""Videos are decoded ahead by other processes, and every step is what it would be without them."""

import logging
import os
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from f2l_vllm import models
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.train.lessons import Lesson, Lessons
from f2l_vllm.train.loader import Loader, default_workers
from f2l_vllm.train.loop import Loop
from f2l_vllm.train.options import TrainingOptions
from f2l_vllm.train.trainer import Trainer
from f2l_vllm.video.sample import Sampling
from tests.support.training import filmed_examples, new_hypernetwork

OPTIONS = TrainingOptions(
    steps=6, videos=2, accumulate=2, questions=2, learning_rate=1e-2, frames=(2, 3), chunks=(1, 2)
)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    folder = tmp_path_factory.mktemp("videos")
    (folder / "broken.mp4").write_bytes(b"no video")
    return [
        *filmed_examples(folder),
        Example("x", folder / "broken.mp4", "What?", "No.", "caption", "world", "train"),
    ]


def train(folder: Path, examples: list[Example], workers: int, stop_after: float = 2.0) -> tuple[dict, dict]:
    """The weights, and what was left out."""
    directory = models.resolve("f2l-tiny")
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)

    def progress(stage: str, done: float) -> None:
        if done > stop_after:
            raise KeyboardInterrupt

    loop = Loop(folder, save_seconds=0.0, on_progress=progress)
    trainer = Trainer(model, AutoProcessor.from_pretrained(directory), new_hypernetwork(model), loop)
    result = trainer.train(examples, OPTIONS, loader_workers=workers)
    return trainer.hyper.state_dict(), result["left_out"]


def test_weights_are_the_same_for_any_number_of_workers_and_after_a_stop_with_another(examples, tmp_path):
    weights, left_out = train(tmp_path / "none", examples, 0)
    ((key, reason),) = left_out.items()
    assert "broken.mp4" in key
    others = [train(tmp_path / "three", examples, 3)]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", examples, 2, stop_after=0.4)
    others.append(train(tmp_path / "stopped", examples, 1))
    for other, other_left_out in others:
        assert all(torch.equal(tensor, other[name]) for name, tensor in weights.items())
        assert other_left_out == {key: reason}


def lessons_of(examples: list[Example]) -> Lessons:
    return Lessons(examples, AutoProcessor.from_pretrained(models.resolve("f2l-tiny")), sampling=Sampling(max_frames=2))


def test_parts_are_drawn_in_other_processes_from_the_first_that_is_taken(examples):
    lessons = lessons_of(examples)

    def draw(number: int) -> list[Lesson]:
        raise ValueError(f"part {number} of {os.getpid()}")

    loader = Loader(lessons, draw, 9, 2)
    told = []
    for number in range(3, 9):
        with pytest.raises(ValueError, match=rf"^part {number} of \d+$") as error:
            loader.take(number)
        told.append(str(error.value).split()[-1])
    loader.close()
    assert len(set(told)) == 2
    assert str(os.getpid()) not in told


def test_a_manifest_without_a_usable_video_is_told_in_the_same_words(examples, caplog):
    def told(workers: int) -> str:
        lessons = lessons_of(examples[-1:])
        state = torch.random.get_rng_state()
        loader = Loader(lessons, lambda number: lessons.take(number, 1, random.Random(0), random.Random(0)), 2, workers)
        with pytest.raises(ValueError, match="None of the 1 videos can be used") as error:
            loader.take(0)
        loader.close()
        assert torch.equal(torch.random.get_rng_state(), state)
        return str(error.value)

    with caplog.at_level(logging.WARNING):
        assert told(0) == told(1)
    assert [record.getMessage() for record in caplog.records] == [
        f"{examples[-1].video_path} is left out: {record.args[1]}" for record in caplog.records
    ]
    assert len(caplog.records) == 2


def test_a_cpu_decodes_in_the_process_and_a_gpu_has_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert default_workers(torch.device("cpu")) == 0
    assert default_workers(torch.device("cuda")) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers(torch.device("cuda")) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers(torch.device("cuda")) == 0
