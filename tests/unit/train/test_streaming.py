"""Training from tar files takes the steps that training from files takes, also after a kill."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from f2l_vllm import models
from f2l_vllm.train.data import shards
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.train.loop import Loop
from f2l_vllm.train.options import TrainingOptions
from f2l_vllm.train.trainer import Trainer
from tests.support.tars import running_site, write_shards
from tests.support.training import filmed_examples, new_hypernetwork

OPTIONS = TrainingOptions(steps=4, videos=2, questions=2, frames=(2, 4), learning_rate=1e-3)


class Killed(Exception):
    pass


def train(
    examples: list[Example], folder: Path | None = None, stop_after: int | None = None
) -> dict[str, torch.Tensor]:
    """The weights after the last step; a checkpoint is written after every step."""
    directory = models.resolve("f2l-tiny")
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)

    def count(_: str, done: float) -> None:
        if stop_after is not None and done * OPTIONS.steps > stop_after:
            raise Killed

    loop = Loop(folder, save_seconds=-1.0, on_progress=count)
    trainer = Trainer(model, AutoProcessor.from_pretrained(directory), new_hypernetwork(model), loop)
    trainer.train(examples, OPTIONS)
    return trainer.hyper.state_dict()


def test_a_run_from_tar_files_goes_on_after_a_kill_and_learns_what_one_from_files_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = filmed_examples(tmp_path)
    pattern = write_shards(tmp_path, examples, 2)
    of_files = train(examples)
    fetched: list[int] = []
    fetch = shards._fetch
    monkeypatch.setattr(shards, "_fetch", lambda **place: fetched.append(place["offset"]) or fetch(**place))
    with running_site(tmp_path) as site:
        streamed = shards.read_examples(f"{site.url}/{pattern}")
        with pytest.raises(Killed):
            train(streamed, tmp_path / "run", stop_after=2)
        assert (tmp_path / "run" / "hypernetwork.ckpt").exists()
        before = len(fetched)
        resumed = train(streamed, tmp_path / "run")
    assert (before, len(fetched)) == (6, 10), "two videos a step; only the steps after the checkpoint are taken again"
    for name, tensor in of_files.items():
        assert torch.equal(tensor, resumed[name]), name
