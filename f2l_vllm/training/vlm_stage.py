"""Stage 2: the model learns to answer with the video in its context."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import SmolVLMForConditionalGeneration, SmolVLMProcessor

from f2l_vllm.training import phrases, stages
from f2l_vllm.training.auxiliary import PatchHead, VelocityHead, patch_targets
from f2l_vllm.training.optimizer import MuonAdamW, warm_constant_linear
from f2l_vllm.training.packing import answer_loss, pack
from f2l_vllm.training.prompts import Prompts, Turn, times_of
from f2l_vllm.training.world import ACTIONS, MOVES, Scene, draw_scene

NAME = "vlm"
BATCH = 32
QUESTIONS = 7
_MOTION_TYPES = ("action of shape", "action of colour", "direction")
_ROUGH = 0.12  # share of questions in lower case or without their last mark


def train_vlm(
    model: SmolVLMForConditionalGeneration,
    processor: SmolVLMProcessor,
    *,
    steps: int,
    seed: int,
    on_progress: stages.Progress | None = None,
) -> dict[str, float]:
    """Train all of the model in place on questions with the video in the context, and some without any.

    The first fifth of the steps shows mostly single, moving shapes; the last two fifths mix frame counts of 4 to 16.

    Returns:
        The first loss and the last, smoothed one.
    """
    randomness = stages.Randomness.of(NAME, seed)
    rng = randomness.rng
    torch.manual_seed(seed)
    prompts = Prompts(processor)
    config: Any = model.config
    text_config = config.text_config
    patch_head, velocity_head = PatchHead(config.vision_config.hidden_size), VelocityHead(text_config.hidden_size)
    heads = [*patch_head.named_parameters(), *velocity_head.named_parameters()]
    named = [*model.named_parameters(), *((f"embed_{name}", p) for name, p in heads)]
    optimizer = MuonAdamW(named, muon_lr=0.02, adamw_lr=2e-3)
    losses = stages.Losses()
    model.train()
    for step in range(steps):
        early, late = step < steps * 0.2, step > steps * 0.6
        num_frames = frame_count(rng) if late else processor.video_processor.num_frames
        count = batch_size(num_frames)
        scenes = [_lesson(rng, early) for _ in range(count)]
        clips = [prompts.draw_clip(num_frames, rng) for _ in scenes]
        times_BT, size = times_of(clips), stages.draw_size(rng)
        pixels = stages.film(scenes, times_BT, size, processor.video_processor, randomness)
        turns = [draw_turns(scene, prompts, rng, text_only_share=0.5) for scene in scenes]
        batch = pack(
            [prompts.video_prefix(clip) for clip in clips],
            turns,
            shared=len(prompts.text_prefix),
            pad_token_id=text_config.pad_token_id,
        )
        output = model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            pixel_values=pixels,
            use_cache=False,
            output_hidden_states=True,
        )
        answers = answer_loss(output.last_hidden_state, batch.labels, model.lm_head)
        targets = patch_targets(scenes, times_BT, size)
        seen, _ = patch_head.loss(output.image_hidden_states.last_hidden_state, targets)
        visual = batch.input_ids == config.image_token_id
        last_input = output.hidden_states[-2][visual].unflatten(0, (count, -1))
        moved = velocity_head.loss(last_input, targets)
        optimizer.step(answers + 0.2 * seen + 0.5 * moved, warm_constant_linear(step, steps))
        losses.add(answers.item())
        figures = {"loss": losses.smoothed, "seen": seen.item(), "moved": moved.item()}
        stages.report(on_progress, NAME, step, steps, figures)
    model.eval()
    return losses.summary()


def frame_count(rng: random.Random) -> int:
    return rng.choice((4, 6, 8, 8, 8, 10, 12, 16))


def batch_size(num_frames: int) -> int:
    """Scenes per step, so that steps of any frame count cost about the same."""
    return BATCH if num_frames <= 8 else max(8, BATCH * 14 // (num_frames + 6))


def draw_turns(
    scene: Scene,
    prompts: Prompts,
    rng: random.Random,
    *,
    text_only_share: float = 0.0,
    with_video: bool = True,
    count: int = QUESTIONS,
) -> list[Turn]:
    """Questions of different types about a scene, motion always among them, and a request for a caption.

    Args:
        text_only_share: how often one of the questions is asked without the video.
        with_video: whether the others are asked with it.
    """
    motion = rng.sample(_MOTION_TYPES, 2)
    others = rng.sample([kind for kind in phrases.QUESTION_TYPES if kind not in _MOTION_TYPES], count - len(motion))
    blind = rng.randrange(count) if rng.random() < text_only_share else -1
    turns = []
    for index, kind in enumerate([*motion, *others, phrases.CAPTION]):
        question, answer, _ = phrases.ask(scene, kind, rng)
        if rng.random() < _ROUGH and question != phrases.INTERNALIZE:
            question = phrases.roughen(question, rng)
        turns.append(prompts.turn(question, answer, kind, with_video=with_video and index != blind))
    return turns


def _lesson(rng: random.Random, early: bool) -> Scene:
    """A training scene; early ones are mostly a single shape, and more often a moving one."""
    if not early:
        return draw_scene(rng)
    actions: Sequence[str] = (*ACTIONS, *MOVES, *MOVES)
    return draw_scene(rng, two_shapes=0.2, actions=actions)
