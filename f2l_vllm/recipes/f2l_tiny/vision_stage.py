"""Stage 1: the vision tower learns to see shapes in single frames."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import SmolVLMForConditionalGeneration, SmolVLMProcessor

from f2l_vllm.recipes.f2l_tiny import filming, precision
from f2l_vllm.recipes.f2l_tiny.auxiliary import PatchHead, patch_targets
from f2l_vllm.synthetic.world import draw_scene
from f2l_vllm.train.loop import Loop, Loss, Stage
from f2l_vllm.train.optimizer import MuonAdamW, warm_constant_linear
from f2l_vllm.train.steps import Randomness

NAME = "vision"
_SCENES, _FRAMES = 48, 6


def train_vision(
    model: SmolVLMForConditionalGeneration, processor: SmolVLMProcessor, loop: Loop, *, steps: int
) -> dict[str, float]:
    """Train the vision tower in place to tell the colour, shape and place of what each patch shows.

    Returns:
        As `Loop.run`.
    """
    torch.manual_seed(loop.seed)
    tower = model.model.vision_model
    config: Any = model.config
    head = PatchHead(config.vision_config.hidden_size)
    named = [*tower.named_parameters(), *((f"embed_{name}", p) for name, p in head.named_parameters())]
    optimizer = MuonAdamW(named, muon_lr=0.02, adamw_lr=2e-3)
    count = loop.share(_SCENES)

    def step_loss(randomness: Randomness, _step: int) -> Loss:
        scenes = [draw_scene(randomness.rng, two_shapes=0.6) for _ in range(count)]
        times_BT = torch.rand(count, _FRAMES, generator=randomness.torch_rng)
        size = filming.draw_size(randomness.rng)
        pixels = filming.film(scenes, times_BT, size, processor.video_processor, randomness)
        with precision.mixed():
            features = tower(pixel_values=pixels.flatten(0, 1)).last_hidden_state
        return Loss(*head.loss(features, patch_targets(scenes, times_BT, size)))

    trained = nn.ModuleDict({"tower": tower, "head": head})
    schedule = partial(warm_constant_linear, warmup=30)
    with precision.attention_in_fp32(model):
        return loop.run(Stage(NAME, trained, optimizer, step_loss, steps, schedule))
