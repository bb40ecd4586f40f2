"""Stage 1: the vision tower learns to see shapes in single frames."""

from __future__ import annotations

from typing import Any

import torch
from transformers import SmolVLMForConditionalGeneration, SmolVLMProcessor

from f2l_vllm.training import stages
from f2l_vllm.training.auxiliary import PatchHead, patch_targets
from f2l_vllm.training.optimizer import MuonAdamW, warm_constant_linear
from f2l_vllm.training.world import draw_scene

NAME = "vision"
_SCENES, _FRAMES = 48, 6


def train_vision(
    model: SmolVLMForConditionalGeneration,
    processor: SmolVLMProcessor,
    *,
    steps: int,
    seed: int,
    on_progress: stages.Progress | None = None,
) -> dict[str, float]:
    """Train the vision tower in place to name colour, shape and place of what each patch shows.

    Returns:
        The first loss and the last, smoothed one.
    """
    randomness = stages.Randomness.of(NAME, seed)
    torch.manual_seed(seed)
    tower = model.model.vision_model
    config: Any = model.config
    head = PatchHead(config.vision_config.hidden_size)
    named = [*tower.named_parameters(), *((f"embed_{name}", p) for name, p in head.named_parameters())]
    optimizer = MuonAdamW(named, muon_lr=0.02, adamw_lr=2e-3)
    losses = stages.Losses()
    for step in range(steps):
        scenes = [draw_scene(randomness.rng, two_shapes=0.6) for _ in range(_SCENES)]
        times_BT = torch.rand(_SCENES, _FRAMES, generator=randomness.torch_rng)
        size = stages.draw_size(randomness.rng)
        pixels = stages.film(scenes, times_BT, size, processor.video_processor, randomness)
        features = tower(pixel_values=pixels.flatten(0, 1)).last_hidden_state
        loss, parts = head.loss(features, patch_targets(scenes, times_BT, size))
        optimizer.step(loss, warm_constant_linear(step, steps, warmup=30))
        losses.add(loss.item())
        stages.report(on_progress, NAME, step, steps, {"loss": losses.smoothed, **parts})
    return losses.summary()
