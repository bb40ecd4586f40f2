"""Token ids of prompts, as SmolVLM's processor and the chat template make them, in the pieces that packing joins.

A question about a video in the context reads
`<|im_start|>User: {frames}{question}<end_of_utterance>\\nAssistant: {answer}<end_of_utterance>`;
a question without a video reads
`<|im_start|>User: {question}<end_of_utterance>\\nAssistant: {answer}<end_of_utterance>`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import SmolVLMProcessor
from transformers.video_utils import VideoMetadata

from f2l_vllm.recipes.f2l_tiny.tokenizer import END_OF_UTTERANCE, IM_START
from f2l_vllm.train.packing import Turn

_FRAME_RATES = (8.0, 10.0, 12.0, 15.0, 24.0, 25.0, 30.0)


@dataclass(frozen=True, slots=True)
class Clip:
    """How a scene is filmed and sampled: frame rate, number of frames, and the frames the model sees."""

    fps: float
    total: int
    indices: tuple[int, ...]

    @property
    def times(self) -> list[float]:
        """Times of the sampled frames in the scene, from 0 to 1."""
        return [(index + 0.5) / self.total for index in self.indices]

    @property
    def metadata(self) -> VideoMetadata:
        return VideoMetadata(
            total_num_frames=self.total,
            fps=self.fps,
            duration=self.total / self.fps,
            frames_indices=list(self.indices),
        )


class Prompts:
    """Pieces of prompts for one processor."""

    def __init__(self, processor: SmolVLMProcessor) -> None:
        self.processor = processor
        self.text_prefix = self.encode(f"{IM_START}User:")
        self._turn = lru_cache(maxsize=200_000)(self._encode_turn)

    def encode(self, text: str) -> list[int]:
        return self.processor.tokenizer.encode(text, add_special_tokens=False)

    def draw_clip(self, num_frames: int, rng: random.Random) -> Clip:
        """A clip of random frame rate and duration from which the processor samples exactly `num_frames` frames."""
        video_processor = self.processor.video_processor
        while True:
            fps = rng.choice(_FRAME_RATES)
            shortest = num_frames / video_processor.fps
            short = rng.random() < 0.8 and shortest < 10
            seconds = rng.uniform(shortest, 10 if short else max(60, 1.5 * shortest))
            total = round(seconds * fps)
            metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)
            indices = video_processor.sample_frames(metadata, num_frames=num_frames)
            if len(indices) == num_frames:
                return Clip(fps, total, tuple(int(index) for index in indices))

    def video_prefix(self, clip: Clip) -> list[int]:
        """`<|im_start|>User: ` and a video of this clip's frames."""
        inputs = {
            "pixel_values": torch.empty(1, len(clip.indices), 0),
            "video_metadata": [clip.metadata],
        }
        return self.encode(f"{IM_START}User: " + self.processor.replace_video_token(inputs, 0))

    def turn(self, question: str, answer: str, kind: str, *, with_video: bool) -> Turn:
        """The rest of the conversation: the question, then the answer."""
        return self._turn(question, answer, kind, with_video)

    def internalization(self, clip: Clip, message: str) -> list[int]:
        """The whole prompt with which the model reads a video to internalize it, without a generation prompt."""
        return self.video_prefix(clip) + self.encode(f"{message}{END_OF_UTTERANCE}\n")

    def _encode_turn(self, question: str, answer: str, kind: str, with_video: bool) -> Turn:
        space = "" if with_video else " "
        asked = self.encode(f"{space}{question}{END_OF_UTTERANCE}\nAssistant:")
        return Turn((*asked, *self.encode(f" {answer}{END_OF_UTTERANCE}")), len(asked), kind, with_video)


def times_of(clips: list[Clip]) -> Tensor:
    """Times [B, T] of the sampled frames; all clips have the same number."""
    return torch.tensor([clip.times for clip in clips])
