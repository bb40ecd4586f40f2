"""Stages 2 and 3: the model learns to answer with the video in its context, then refines its answers.

The refinement has a lower learning rate and harder lessons: mostly two shapes, whose properties have to be told apart,
and any number of frames.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import SmolVLMForConditionalGeneration, SmolVLMProcessor

from f2l_vllm.hypernetwork.config import INSTRUCTION
from f2l_vllm.recipes.f2l_tiny import filming, precision
from f2l_vllm.recipes.f2l_tiny.auxiliary import PatchHead, VelocityHead, patch_targets
from f2l_vllm.recipes.f2l_tiny.prompts import Prompts, times_of
from f2l_vllm.synthetic import phrases
from f2l_vllm.synthetic.world import ACTIONS, MOVES, Scene, draw_scene
from f2l_vllm.train.loop import Loop, Loss, Stage
from f2l_vllm.train.optimizer import MuonAdamW, warm_constant_linear
from f2l_vllm.train.packing import Turn, answer_loss, pack
from f2l_vllm.train.steps import Randomness

BATCH = 32
QUESTIONS = 7
_MOTION_TYPES = ("action of shape", "action of colour", "direction")
_VISION_PACE = 0.25  # the tower can see already; at the text model's rates it would forget for half of the stage
_ROUGH = 0.12  # share of questions in lower case or without their last mark


@dataclass(frozen=True, slots=True)
class Course:
    """How one of the two stages teaches.

    Attributes:
        easy_until: until this part of the stage, scenes are mostly single, moving shapes.
        mixed_from: from this part of the stage on, the number of frames varies from 4 to 64.
        two_shapes: share of scenes with two shapes, after the easy part.
        seen_weight, moved_weight: of the auxiliary losses for what patches show and how it moves.
        decay_from: from this part of the stage on, the learning rates fall.
    """

    name: str
    muon_lr: float
    adamw_lr: float
    easy_until: float
    mixed_from: float
    two_shapes: float
    seen_weight: float
    moved_weight: float
    decay_from: float


FIRST = Course("vlm", 0.02, 2e-3, 0.2, 0.6, 0.6, 0.2, 0.5, 0.5)
REFINEMENT = Course("refinement", 0.008, 8e-4, 0.0, 0.0, 0.75, 0.0, 0.0, 0.2)


def train_vlm(
    model: SmolVLMForConditionalGeneration,
    processor: SmolVLMProcessor,
    loop: Loop,
    *,
    steps: int,
    course: Course = FIRST,
) -> dict[str, float]:
    """Train all of the model in place on questions with the video in the context, and some without any.

    Returns:
        As `Loop.run`.
    """
    torch.manual_seed(loop.seed)
    prompts = Prompts(processor)
    config: Any = model.config
    text_config = config.text_config
    patch_head = PatchHead(config.vision_config.hidden_size)
    # One head in the middle: if the model knows a movement early, the later layers can tell which shape moves.
    layers = (text_config.num_hidden_layers // 2, text_config.num_hidden_layers - 1)
    velocity_heads = nn.ModuleList(VelocityHead(text_config.hidden_size) for _ in layers)
    heads = [*patch_head.named_parameters(), *velocity_heads.named_parameters()]
    named = [*model.named_parameters(), *((f"embed_{name}", p) for name, p in heads)]
    tower = ("model.vision_model.", _VISION_PACE)
    optimizer = MuonAdamW(named, muon_lr=course.muon_lr, adamw_lr=course.adamw_lr, slow=tower)

    def step_loss(randomness: Randomness, step: int) -> Loss:
        rng = randomness.rng
        mixed = step > steps * course.mixed_from
        num_frames = frame_count(randomness.shared) if mixed else processor.video_processor.num_frames
        count = loop.share(batch_size(num_frames))
        scenes = [_lesson(rng, course, easy=step < steps * course.easy_until) for _ in range(count)]
        clips = [prompts.draw_clip(num_frames, rng) for _ in scenes]
        times_BT, size = times_of(clips), filming.draw_size(rng)
        pixels = filming.film(scenes, times_BT, size, processor.video_processor, randomness)
        turns = [draw_turns(scene, prompts, rng, text_only_share=0.25) for scene in scenes]
        batch = pack(
            [prompts.video_prefix(clip) for clip in clips],
            turns,
            shared=len(prompts.text_prefix),
            pad_token_id=text_config.pad_token_id,
        )
        with precision.mixed():
            output = model.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                pixel_values=pixels,
                use_cache=False,
                output_hidden_states=True,
            )
            answers = answer_loss(output.last_hidden_state, batch, model.lm_head)
        if not course.seen_weight and not course.moved_weight:
            return Loss(answers, {"answers": answers.item()})
        targets = patch_targets(scenes, times_BT, size)
        seen, _ = patch_head.loss(output.image_hidden_states.last_hidden_state, targets)
        visual = batch.input_ids == config.image_token_id
        moved = torch.zeros(())
        for layer, head in zip(layers, velocity_heads, strict=True):
            entering = output.hidden_states[layer][visual].unflatten(0, (count, -1))
            moved = moved + head(entering, targets)
        loss = answers + course.seen_weight * seen + course.moved_weight * moved
        return Loss(loss, {"answers": answers.item(), "seen": seen.item(), "moved": moved.item()})

    trained = nn.ModuleDict({"model": model, "patches": patch_head, "velocity": velocity_heads})
    schedule = partial(warm_constant_linear, decay_from=course.decay_from)
    with precision.attention_in_fp32(model):
        return loop.run(Stage(course.name, trained, optimizer, step_loss, steps, schedule))


def frame_count(rng: random.Random) -> int:
    return rng.choice((4, 6, 8, 8, 8, 12, 16, 24, 32, 64))


def batch_size(num_frames: int) -> int:
    """Scenes per step, so that steps of any frame count cost about the same."""
    return BATCH if num_frames <= 8 else max(8, BATCH * 14 // (num_frames + 6))


def draw_turns(
    scene: Scene,
    prompts: Prompts,
    rng: random.Random,
    *,
    questions: int = QUESTIONS,
    text_only_share: float = 0.0,
    with_video: bool = True,
) -> list[Turn]:
    """Questions of different types about a scene, including all types about motion, and a request for a caption.

    Args:
        questions: how many, besides the caption.
        text_only_share: how often one of the questions is asked without the video.
        with_video: whether the other questions are asked with the video.
    """
    others = [kind for kind in phrases.QUESTION_TYPES if kind not in _MOTION_TYPES]
    others = rng.sample(others, questions - len(_MOTION_TYPES))
    blind = rng.randrange(questions) if rng.random() < text_only_share else -1
    turns = []
    for index, kind in enumerate([*_MOTION_TYPES, *others, phrases.CAPTION]):
        question, answer, _ = phrases.ask(scene, kind, rng)
        if rng.random() < _ROUGH and question != INSTRUCTION:
            question = phrases.roughen(question, rng)
        turns.append(prompts.turn(question, answer, kind, with_video=with_video and index != blind))
    return turns


def _lesson(rng: random.Random, course: Course, *, easy: bool) -> Scene:
    """A training scene; easy ones are mostly a single shape, and more often a moving one."""
    if not easy:
        return draw_scene(rng, two_shapes=course.two_shapes)
    actions: Sequence[str] = (*ACTIONS, *MOVES, *MOVES)
    return draw_scene(rng, two_shapes=0.2, actions=actions)
