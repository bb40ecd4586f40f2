"""Stages 4 and 5: the hypernetwork learns to turn what the frozen model saw into an adapter that answers blindly.

Besides whole videos it learns the two ways in which adapters are composed: one video cut into several pieces in time,
and two videos, each with one of the shapes that are asked about. Without these lessons, concatenated adapters count
everything twice. In stage 5 videos are long: up to 1,024 frames at once, and up to 8 pieces.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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

_CUT_SHARE = 0.15  # of the steps, one video in 2 to 4 pieces
_PAIR_SHARE = 0.15  # of the steps, two videos
_LONG_SHARE, _LONG_CUT_SHARE = 0.45, 0.25  # of the steps of stage 5: many frames at once, many pieces
_LONG = (96, 128, 192, 256, 384, 512, 768, 1024)
_FRAMES_A_STEP = 1024  # of long videos, so that steps cost about the same

Pieces = list[tuple[list[Scene], list[Clip]]]
Lesson = tuple[list[Scene], Pieces]


@dataclass(frozen=True, slots=True)
class Course:
    """How one of the two stages teaches.

    Attributes:
        lesson: draws the scenes that questions are about, and the videos (pieces of each adapter) that show them, given
            how much of the stage is done.
        decay_from: from this part of the stage on, the learning rates fall.
    """

    name: str
    muon_lr: float
    adamw_lr: float
    lesson: Callable[[Prompts, Randomness, Loop, float], Lesson]
    decay_from: float


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
    course: Course | None = None,
) -> dict[str, float]:
    """Train the hypernetwork in place, by `FIRST` or another course; the model stays as it is.

    Returns:
        As `Loop.run`.
    """
    torch.manual_seed(loop.seed)
    model.eval().requires_grad_(False)
    prompts = Prompts(processor)
    course = course or FIRST
    optimizer = MuonAdamW(hypernetwork.named_parameters(), muon_lr=course.muon_lr, adamw_lr=course.adamw_lr)

    def step_loss(randomness: Randomness, step: int) -> Loss:
        scenes, pieces = course.lesson(prompts, randomness, loop, step / steps)
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
        schedule = partial(warm_constant_linear, decay_from=course.decay_from)
        return loop.run(Stage(course.name, hypernetwork, optimizer, step_loss, steps, schedule))


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


def _lesson(prompts: Prompts, randomness: Randomness, loop: Loop, done: float) -> Lesson:
    """A video of 8 frames, after a while of 4 to 64 or in pieces; or two videos."""
    mixed = done > 0.3
    shared, rng = randomness.shared, randomness.rng
    kind = shared.random()
    if mixed and kind < _CUT_SHARE:
        count, num_frames = shared.choice((2, 2, 3, 4)), shared.choice((4, 6, 8))
        rows = BATCH if count == 2 else max(8, 2 * BATCH // count)
        return cut_in_time(prompts, rng, count, num_frames, loop.share(rows))
    if kind < _CUT_SHARE + _PAIR_SHARE:
        return pairs(prompts, rng, loop.share(BATCH), 8 if not mixed else shared.choice((4, 8)))
    num_frames = frame_count(shared) if mixed else 8
    return _whole(prompts, rng, num_frames, loop.share(batch_size(num_frames)))


def _long_lesson(prompts: Prompts, randomness: Randomness, loop: Loop, _: float) -> Lesson:
    """A long video at once or in up to 8 pieces; or what `_lesson` ends with."""
    shared, rng = randomness.shared, randomness.rng
    kind = shared.random()
    if kind < _LONG_SHARE:
        num_frames = shared.choice(_LONG)
        return _whole(prompts, rng, num_frames, loop.share(_FRAMES_A_STEP // num_frames))
    if kind < _LONG_SHARE + _LONG_CUT_SHARE:
        count, num_frames = shared.choice((3, 4, 6, 8)), shared.choice((4, 8, 16))
        rows = min(BATCH // 2, _FRAMES_A_STEP // (2 * count * num_frames))
        return cut_in_time(prompts, rng, count, num_frames, loop.share(rows))
    return _lesson(prompts, randomness, loop, 1.0)


def _whole(prompts: Prompts, rng: random.Random, num_frames: int, rows: int) -> Lesson:
    scenes = [draw_scene(rng) for _ in range(rows)]
    return scenes, [(scenes, [prompts.draw_clip(num_frames, rng) for _ in scenes])]


FIRST = Course("hypernetwork", 0.01, 2e-3, _lesson, decay_from=0.5)
LENGTH = Course("length", 0.004, 8e-4, _long_lesson, decay_from=0.3)


def cut_in_time(
    prompts: Prompts, rng: random.Random, count: int, num_frames: int, rows: int, split: str = "train"
) -> Lesson:
    """Scenes filmed once, the frames cut into `count` consecutive pieces of `num_frames`."""
    scenes = [draw_scene(rng, split) for _ in range(rows)]
    clips = [prompts.draw_clip(count * num_frames, rng) for _ in scenes]
    pieces = []
    for first in range(0, count * num_frames, num_frames):
        window = slice(first, first + num_frames)
        pieces.append((scenes, [replace(clip, indices=clip.indices[window]) for clip in clips]))
    return scenes, pieces


def pairs(prompts: Prompts, rng: random.Random, rows: int, num_frames: int, split: str = "train") -> Lesson:
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
