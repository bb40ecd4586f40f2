"""How well a trained model answers, next to controls that give the score its meaning.

Arms: `adapter` (the question alone, with the video's adapter), `frames` (the frames in the prompt), `none`
(the question alone: the score of guessing), `wrong-video` (with the adapter of another video). There is one question
of each type about every scene, so the mean over questions is the macro mean over types. Exact match, greedy.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from f2l_vllm.hypernetwork.adapter import Factors
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.recipes.f2l_tiny import filming
from f2l_vllm.recipes.f2l_tiny.hypernetwork_stage import adapted_hidden, cut_in_time, encode, pairs, text_only_batch
from f2l_vllm.recipes.f2l_tiny.prompts import Prompts, times_of
from f2l_vllm.synthetic import phrases
from f2l_vllm.synthetic.world import Scene, sample_scenes
from f2l_vllm.train.packing import Turn, exact_matches, pack
from f2l_vllm.train.steps import Randomness, one_thread

ADAPTER, FRAMES, NONE, WRONG_VIDEO = ARMS = ("adapter", "frames", "none", "wrong-video")  # as in `evaluation/`
Question = tuple[str, str, str]  # text, true answer, type
_BATCH = 32
_FRAME_COUNTS = (4, 16, 32, 64)  # besides the processor's own 8


@dataclass
class Tally:
    """Right and wrong answers of one arm: kind of question -> one bool per video."""

    answers: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))

    def summary(self) -> dict[str, Any]:
        """Macro exact match over question types with a 95 % interval over videos, the score by type, and captions'."""
        kinds = [kind for kind in self.answers if kind != phrases.CAPTION]
        per_video = torch.tensor([self.answers[kind] for kind in kinds]).float().mean(0)
        half = 1.96 * per_video.std().item() / len(per_video) ** 0.5 if len(per_video) > 1 else 1.0
        by_type = {kind: round(sum(answers) / len(answers), 4) for kind, answers in self.answers.items()}
        caption = by_type.pop(phrases.CAPTION, None)
        return {
            "exact_match": round(per_video.mean().item(), 4),
            "interval_95": round(half, 4),
            "videos": len(per_video),
            "caption_exact_match": caption,
            "by_type": by_type,
        }


class Scorer:
    """A model, its hypernetwork and its prompts, ready to answer."""

    def __init__(self, directory: str | Path) -> None:
        """Load what `make_model` wrote, in fp32."""
        directory = Path(directory)
        self.processor = AutoProcessor.from_pretrained(directory)
        self.model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
        self.hypernetwork = Hypernetwork.load(directory / "hypernetwork").float().eval()
        self.prompts = Prompts(self.processor)

    def questions(self, scenes: Sequence[Scene], seed: int, *, unseen: bool = False) -> list[list[Question]]:
        """One question of each type and a request for a caption per scene: (question, answer, type)."""
        rng = random.Random(f"questions:{seed}")
        kinds = (*phrases.QUESTION_TYPES, phrases.CAPTION)
        return [[phrases.ask(scene, kind, rng, unseen=unseen) for kind in kinds] for scene in scenes]

    @torch.no_grad()
    def score_tensors(
        self,
        scenes: Sequence[Scene],
        *,
        seed: int,
        num_frames: int = 8,
        unseen_phrasing: bool = False,
        arms: Sequence[str] = ARMS,
    ) -> dict[str, Tally]:
        """Score every arm on frames drawn as the processor would return them, without a file in between."""
        tallies = {arm: Tally() for arm in arms}
        rng = random.Random(f"clips:{seed}")
        for first in range(0, len(scenes), _BATCH):
            some = scenes[first : first + _BATCH]
            clips = [self.prompts.draw_clip(num_frames, rng) for _ in some]
            randomness = Randomness.of("score", seed + first)
            size = filming.draw_size(rng)
            pixels = filming.film(some, times_of(clips), size, self.processor.video_processor, randomness)
            asked = self.questions(some, seed + first, unseen=unseen_phrasing)
            factors = self.hypernetwork.combine([self.hypernetwork(encode(self.model, self.prompts, clips, pixels))])
            for arm, tally in tallies.items():
                if arm == FRAMES:
                    prefixes = [self.prompts.video_prefix(clip) for clip in clips]
                    self._count_in_context(tally, asked, prefixes, pixels)
                else:
                    self._count_text_only(tally, asked, _factors_of(arm, factors))
        return tallies

    @torch.no_grad()
    def score_composed(self, *, videos: int, seed: int, split: str = "held-out") -> dict[str, Tally]:
        """Score adapters composed in rank space: two videos with a shape each; one video in two and in four pieces."""
        tallies = {"two videos": Tally(), "one video in 2 pieces": Tally(), "one video in 4 pieces": Tally()}
        rng = random.Random(f"composed:{seed}")
        for first in range(0, videos, _BATCH):
            lessons = (
                pairs(self.prompts, rng, _BATCH, 8, split),
                cut_in_time(self.prompts, rng, 2, 8, _BATCH, split),
                cut_in_time(self.prompts, rng, 4, 4, _BATCH, split),
            )
            randomness = Randomness.of("composed", seed + first)
            for tally, (scenes, pieces) in zip(tallies.values(), lessons, strict=True):
                chunks = []
                for piece_scenes, clips in pieces:
                    pixels = filming.film(
                        piece_scenes, times_of(clips), (320, 240), self.processor.video_processor, randomness
                    )
                    chunks.append(self.hypernetwork(encode(self.model, self.prompts, clips, pixels)))
                self._count_text_only(tally, self.questions(scenes, seed + first), self.hypernetwork.combine(chunks))
        return tallies

    def _turns(self, asked: list[list[Question]], *, with_video: bool) -> list[list[Turn]]:
        return [[self.prompts.turn(*question, with_video=with_video) for question in row] for row in asked]

    def _count_in_context(
        self, tally: Tally, asked: list[list[Question]], prefixes: list[list[int]], pixels: Tensor
    ) -> None:
        pad = self.model.config.text_config.pad_token_id
        batch = pack(prefixes, self._turns(asked, with_video=True), shared=0, pad_token_id=pad)
        output = self.model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            pixel_values=pixels,
            use_cache=False,
        )
        _count(tally, asked, exact_matches(output.last_hidden_state, batch, self.model.lm_head))

    def _count_text_only(self, tally: Tally, asked: list[list[Question]], factors: Factors) -> None:
        batch = text_only_batch(self.prompts, self._turns(asked, with_video=False), self.model)
        hidden = adapted_hidden(self.model, batch, factors, self.hypernetwork.scale)
        _count(tally, asked, exact_matches(hidden, batch, self.model.lm_head))


def _factors_of(arm: str, factors: Factors) -> Factors:
    if arm == NONE:
        return {}
    if arm == WRONG_VIDEO:
        return {name: (a.roll(1, 0), b.roll(1, 0)) for name, (a, b) in factors.items()}
    return factors


def _count(tally: Tally, asked: list[list[Question]], matches: list[list[bool]]) -> None:
    for questions, right in zip(asked, matches, strict=True):
        for (_, _, kind), match in zip(questions, right, strict=True):
            tally.answers[kind].append(match)


@one_thread()
def score_model(directory: str | Path, *, scenes: int = 512, seed: int = 1000) -> dict[str, Any]:
    """Score a model directory on fresh scenes, without files; `f2l-vllm eval` scores mp4 files.

    Args:
        scenes: number of held-out scenes; parts other than the main one take half or a quarter of them.

    Returns:
        Part -> arm -> {exact_match, interval_95, videos, caption_exact_match, by_type}.
    """
    scorer = Scorer(directory)
    half, quarter = max(1, scenes // 2), max(1, scenes // 4)
    held_out, known = sample_scenes(scenes, seed, "held-out"), sample_scenes(half, seed, "train")
    new_triples = [scene for scene in held_out if scene.has_unseen_triple]
    short = (ADAPTER, FRAMES)
    parts = {
        "held-out scenes": scorer.score_tensors(held_out, seed=seed),
        "held-out, unseen triples only": scorer.score_tensors(new_triples, seed=seed, arms=short),
        "held-out, unseen phrasing": scorer.score_tensors(held_out[:half], seed=seed, unseen_phrasing=True),
        "fresh scenes of the training distribution": scorer.score_tensors(known, seed=seed, arms=short),
        **{
            f"held-out, {count} frames": scorer.score_tensors(
                held_out[:quarter], seed=seed, num_frames=count, arms=short
            )
            for count in _FRAME_COUNTS
        },
        "held-out, composed adapters": scorer.score_composed(videos=quarter, seed=seed),
    }
    return {part: {arm: tally.summary() for arm, tally in tallies.items()} for part, tallies in parts.items()}
