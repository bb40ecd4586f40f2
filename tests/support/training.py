"""What tests of training share: examples with videos, and the command."""

import random
import sys
from pathlib import Path

import torch

from f2l_vllm.base_models.text_layers import module_sizes
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.synthetic import phrases
from f2l_vllm.synthetic.render import write_mp4
from f2l_vllm.synthetic.world import sample_scenes
from f2l_vllm.train.data.manifest import Example

STEPS = "--steps 30 --videos 2 --questions 3 --frames 4 --longest-edge 48 --chunks 1,2"


def filmed_examples(folder: Path) -> list[Example]:
    """Every question about each of four scenes, and their descriptions."""
    made = []
    for number, scene in enumerate(sample_scenes(4, seed=3)):
        video = write_mp4(scene, folder / f"{number}.mp4", size=(64, 48), seconds=3)
        asked = phrases.questions(scene, random.Random(number))
        asked.append(("Describe the video.", phrases.caption(scene), "caption"))
        made += [
            Example(f"{number}-{index}", video, question, answer, kind, "world", "train")
            for index, (question, answer, kind) in enumerate(asked)
        ]
    return made


def new_hypernetwork(model: torch.nn.Module, seed: int = 0) -> Hypernetwork:
    """A small one for the default model."""
    torch.manual_seed(seed)
    text_config = model.config.text_config
    config = HypernetworkConfig(
        base_model="f2l-tiny",
        num_layers=text_config.num_hidden_layers,
        feature_size=text_config.hidden_size,
        modules=module_sizes(model, ["down_proj"]),
        rank=4,
        latent_size=32,
        num_blocks=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    return Hypernetwork(config)


def train_words(folder: Path, manifest: Path | str, steps: str = STEPS) -> list[str]:
    options = ["--rank", "4", "--latent-size", "32", "--blocks", "1", *steps.split(" ")]
    return ["train", str(folder), "--manifest", str(manifest), *options]


def train_command(folder: Path, manifest: Path | str, *launch: str, steps: str = STEPS) -> list[str]:
    return [sys.executable, *launch, "-m", "f2l_vllm.cli", *train_words(folder, manifest, steps)]
