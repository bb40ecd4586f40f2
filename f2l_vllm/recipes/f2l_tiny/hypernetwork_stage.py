"""Stage 4: the hypernetwork learns to turn what the frozen model saw into an adapter that answers without seeing.

Besides whole videos it learns the two ways in which adapters are composed: one video cut into several pieces in time,
and two videos, each with one of the shapes that are asked about. Without these lessons, concatenated adapters count
everything twice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature, SmolVLMForConditionalGeneration, SmolVLMProcessor

from f2l_vllm.base_models.text_layers import module_sizes
from f2l_vllm.hypernetwork.adapter import Factors, apply_factors
from f2l_vllm.hypernetwork.config import INSTRUCTION, HypernetworkConfig
from f2l_vllm.hypernetwork.encoder import VideoEncoder
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.recipes.f2l_tiny import filming, precision
from f2l_vllm.recipes.f2l_tiny.prompts import Clip, Prompts, times_of
from f2l_vllm.recipes.f2l_tiny.vlm_stage import BATCH, batch_size, draw_turns, frame_count
from f2l_vllm.synthetic import phrases
from f2l_vllm.synthetic.world import Scene, draw_scene
from f2l_vllm.train.loop import Loop, Loss, Stage
from f2l_vllm.train.optimizer import MuonAdamW, warm_constant_linear
from f2l_vllm.train.packing import PackedBatch, Turn, answer_loss, pack
from f2l_vllm.train.steps import Randomness

NAME = "hypernetwork"
_CUT_SHARE = 0.15  # of the steps, one video in 2 to 4 pieces
_PAIR_SHARE = 0.15  # of the steps, two videos


def build_hypernetwork(model: SmolVLMForConditionalGeneration, base_model: str, *, seed: int) -> Hypernetwork:
    """A fresh hypernetwork for the default model, its linears scaled to their fan-in for this small width."""
    base: Any = model.config
    text_config = base.text_config
    config = HypernetworkConfig(
        base_model=base_model,
        num_layers=text_config.num_hidden_layers,
        feature_size=text_config.hidden_size,
        modules=module_sizes(model, ["down_proj"]),
        rank=8,
        latent_size=128,
        num_latents=8,
        num_blocks=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
    )
    torch.manual_seed(seed)
    hypernetwork = Hypernetwork(config)
    for module in hypernetwork.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return hypernetwork


def train_hypernetwork(
    hypernetwork: Hypernetwork,
    model: SmolVLMForConditionalGeneration,
    processor: SmolVLMProcessor,
    loop: Loop,
    *,
    steps: int,
) -> dict[str, float]:
    """Train the hypernetwork in place; the model stays as it is.

    Returns:
        As `Loop.run`.
    """
    torch.manual_seed(loop.seed)
    model.eval().requires_grad_(False)
    prompts = Prompts(processor)
    optimizer = MuonAdamW(hypernetwork.named_parameters(), muon_lr=0.01, adamw_lr=2e-3)

    def step_loss(randomness: Randomness, step: int) -> Loss:
        scenes, pieces = _lesson(prompts, randomness, loop, mixed=step > steps * 0.3)
        size = filming.draw_size(randomness.rng)
        chunks = []
        for piece_scenes, clips in pieces:
            pixels = filming.film(piece_scenes, times_of(clips), size, processor.video_processor, randomness)
            with precision.mixed():
                features = encode(model, prompts, clips, pixels)
            chunks.append(hypernetwork(features))
        # Every kind in every row: yes/no questions are learned late, and with some seeds never when they are rarer.
        kinds = len(phrases.QUESTION_TYPES)
        turns = [draw_turns(scene, prompts, randomness.rng, questions=kinds, with_video=False) for scene in scenes]
        batch = text_only_batch(prompts, turns, model)
        with precision.mixed():
            hidden = adapted_hidden(model, batch, hypernetwork.combine(chunks), hypernetwork.scale)
            return Loss(answer_loss(hidden, batch, model.lm_head))

    with precision.attention_in_fp32(model):
        return loop.run(Stage(NAME, hypernetwork, optimizer, step_loss, steps, warm_constant_linear))


@torch.no_grad()
def encode(
    model: SmolVLMForConditionalGeneration, prompts: Prompts, clips: Sequence[Clip], pixel_values: Tensor
) -> Tensor:
    """The inputs of each text layer while the model reads the internalization message: [B, L, T, D]."""
    ids = torch.tensor([prompts.internalization(clip, INSTRUCTION) for clip in clips])
    inputs = BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values})
    return VideoEncoder(model, prompts.processor).features(inputs)[0]


def text_only_batch(
    prompts: Prompts, turns: Sequence[Sequence[Turn]], model: SmolVLMForConditionalGeneration
) -> PackedBatch:
    """Rows of questions without any video."""
    prefix = prompts.text_prefix
    config: Any = model.config
    pad = config.text_config.pad_token_id
    return pack([prefix] * len(turns), turns, shared=len(prefix), pad_token_id=pad)


def adapted_hidden(
    model: SmolVLMForConditionalGeneration, batch: PackedBatch, factors: Factors, scale: float
) -> Tensor:
    """The text model's output [B, S, D] under one adapter per row."""
    with apply_factors(model, factors, scale):
        output = model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )
    return output.last_hidden_state


Pieces = list[tuple[list[Scene], list[Clip]]]


def _lesson(prompts: Prompts, randomness: Randomness, loop: Loop, *, mixed: bool) -> tuple[list[Scene], Pieces]:
    """The scenes that questions are about, and the videos (chunks of each adapter) that show them."""
    shared, rng = randomness.shared, randomness.rng
    kind = shared.random()
    if mixed and kind < _CUT_SHARE:
        count, num_frames = shared.choice((2, 2, 3, 4)), shared.choice((4, 6, 8))
        rows = BATCH if count == 2 else max(8, 2 * BATCH // count)
        return cut_in_time(prompts, rng, count, num_frames, loop.share(rows))
    if kind < _CUT_SHARE + _PAIR_SHARE:
        return pairs(prompts, rng, loop.share(BATCH), 8 if not mixed else shared.choice((4, 8)))
    num_frames = frame_count(shared) if mixed else 8
    scenes = [draw_scene(rng) for _ in range(loop.share(batch_size(num_frames)))]
    return scenes, [(scenes, [prompts.draw_clip(num_frames, rng) for _ in scenes])]


def cut_in_time(
    prompts: Prompts, rng: random.Random, count: int, num_frames: int, rows: int, split: str = "train"
) -> tuple[list[Scene], Pieces]:
    """Scenes filmed once, the frames cut into `count` consecutive pieces of `num_frames`."""
    scenes = [draw_scene(rng, split) for _ in range(rows)]
    clips = [prompts.draw_clip(count * num_frames, rng) for _ in scenes]
    pieces = []
    for first in range(0, count * num_frames, num_frames):
        window = slice(first, first + num_frames)
        pieces.append((scenes, [replace(clip, indices=clip.indices[window]) for clip in clips]))
    return scenes, pieces


def pairs(
    prompts: Prompts, rng: random.Random, rows: int, num_frames: int, split: str = "train"
) -> tuple[list[Scene], Pieces]:
    """Scenes of two shapes, seen as two videos with one of the shapes each, in either order."""
    scenes: list[Scene] = []
    while len(scenes) < rows:
        scene = draw_scene(rng, split, two_shapes=1.0)
        if split != "train" or not any(_alone(scene, index).held_out for index in (0, 1)):
            scenes.append(scene)
    orders = [rng.sample((0, 1), 2) for _ in scenes]
    pieces = []
    for place in (0, 1):
        parts = [_alone(scene, order[place]) for scene, order in zip(scenes, orders, strict=True)]
        pieces.append((parts, [prompts.draw_clip(num_frames, rng) for _ in parts]))
    return scenes, pieces


def _alone(scene: Scene, index: int) -> Scene:
    return replace(scene, shapes=(scene.shapes[index],))
