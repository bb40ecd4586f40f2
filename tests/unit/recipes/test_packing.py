"""A packed row computes what its prompts compute one by one."""

import random

import pytest
import torch

from f2l_vllm.recipes.f2l_tiny.checkpoint import build_model, build_processor
from f2l_vllm.recipes.f2l_tiny.filming import pixel_values
from f2l_vllm.recipes.f2l_tiny.prompts import Prompts, times_of
from f2l_vllm.recipes.f2l_tiny.vlm_stage import draw_turns
from f2l_vllm.synthetic.world import sample_scenes
from f2l_vllm.train.packing import IGNORED, answer_loss, exact_matches, pack


@pytest.fixture(scope="module")
def setup():
    processor = build_processor()
    model = build_model(processor, seed=1)
    prompts = Prompts(processor)
    rng = random.Random(0)
    scenes = sample_scenes(3, 0)
    clips = [prompts.draw_clip(5, rng) for _ in scenes]
    pixels = pixel_values(scenes, times_of(clips), (320, 240), processor.video_processor)
    turns = [draw_turns(scene, prompts, rng, text_only_share=1.0) for scene in scenes]
    prefixes = [prompts.video_prefix(clip) for clip in clips]
    batch = pack(prefixes, turns, shared=len(prompts.text_prefix), pad_token_id=processor.tokenizer.pad_token_id)
    return model, prompts, pixels, turns, prefixes, batch


@torch.no_grad()
def test_packed_logits_are_those_of_each_prompt_alone(setup):
    model, prompts, pixels, turns, prefixes, batch = setup
    packed = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        pixel_values=pixels,
        use_cache=False,
    ).logits
    text_only = 0
    for row, (row_turns, spans) in enumerate(zip(turns, batch.spans, strict=True)):
        for turn, (first, last) in zip(row_turns, spans, strict=True):
            prefix = prefixes[row] if turn.with_video else prompts.text_prefix
            alone = model(
                input_ids=torch.tensor([[*prefix, *turn.ids]]),
                pixel_values=pixels[row : row + 1] if turn.with_video else None,
                use_cache=False,
            ).logits[0]
            torch.testing.assert_close(packed[row, first:last], alone[first - last - 1 : -1], atol=1e-5, rtol=1e-5)
            text_only += not turn.with_video
    assert text_only == 3


def test_labels_are_the_answers_and_nothing_else(setup):
    _, prompts, _, turns, _, batch = setup
    answers = [list(turn.ids[turn.answer_start :]) for row in turns for turn in row]
    found = [batch.labels[row, a:b].tolist() for row, spans in enumerate(batch.spans) for a, b in spans]
    assert found == answers
    assert int((batch.labels != IGNORED).sum()) == sum(len(answer) for answer in answers)
    assert all(prompts.processor.tokenizer.decode(answer).endswith(".<end_of_utterance>") for answer in answers)


def test_exact_match_is_right_when_and_only_when_every_token_is(setup):
    batch = setup[-1]
    vocabulary = 900
    onehot = torch.nn.functional.one_hot(batch.labels.clamp_min(0), vocabulary).float()
    assert all(all(row) for row in exact_matches(onehot, batch, torch.nn.Identity()))
    row, (first, last) = 1, batch.spans[1][2]
    onehot[row, last - 1] = 0
    matches = exact_matches(onehot, batch, torch.nn.Identity())
    assert [turn for turn, right in enumerate(matches[row]) if not right] == [2]
    assert first < last


def test_loss_of_perfect_logits_is_zero(setup):
    batch = setup[-1]
    onehot = torch.nn.functional.one_hot(batch.labels.clamp_min(0), 900).float() * 100
    assert answer_loss(onehot, batch, torch.nn.Identity()).item() < 1e-6


def test_prefixes_of_different_lengths_are_refused(setup):
    turns = setup[3]
    with pytest.raises(ValueError, match="one length"):
        pack([[1, 2], [1, 2, 3]], turns[:2], shared=0, pad_token_id=0)
