"""The costs of a question that need no measurement: its prompt's tokens, and the bytes that keep a video answerable.

Both are exact: the model's own processor writes the prompt, the adapter is written as it is published, and the
configuration gives the size of the KV cache.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from f2l_vllm.base_models.merging import tokens_of_frames
from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.bench.shapes import Subject
from f2l_vllm.hypernetwork.adapter import WEIGHTS_FILE, save_tensors
from f2l_vllm.hypernetwork.config_file import read_config


class Costs:
    """Costs for one model and its hypernetwork."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.dtype = subject.dtype
        text = json.loads((subject.directory / "config.json").read_text())["text_config"]
        heads = text["num_attention_heads"]
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
        entries = 2 * text["num_hidden_layers"] * text.get("num_key_value_heads", heads) * head_dim
        self.kv_bytes_per_token = int(entries * getattr(torch, subject.dtype).itemsize)
        self.longest = int(text["max_position_embeddings"])
        self.rank = 2 * read_config(subject.hypernetwork).rank  # a video's, and the bias's

    @cached_property
    def processor(self) -> Any:
        """The model's processor."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self._subject.directory)

    @cached_property
    def adapter_bytes(self) -> int:
        """Size of one video's adapter file."""
        with tempfile.TemporaryDirectory(prefix="f2l-bench-") as folder:
            write_adapter(self._subject, Path(folder) / "adapter", self.rank, seed=None)
            return (Path(folder) / "adapter" / WEIGHTS_FILE).stat().st_size

    def visual_tokens(self, frames: int, merge_rate: float = 0.0) -> int:
        """Tokens of a video in the prompt, without the words around its frames."""
        if not frames:
            return 0
        return int(sum(tokens_of_frames(frames, self.processor.image_seq_len, merge_rate)))

    def kv_bytes(self, frames: int) -> int:
        """Bytes of the KV cache of a video's visual tokens."""
        return self.visual_tokens(frames) * self.kv_bytes_per_token

    def prompt_tokens(self, question: str, frames: int = 0) -> int:
        """Tokens of a question's prompt; with `frames`, including a video of as many seconds."""
        content: list[dict[str, str]] = [{"type": "text", "text": question}]
        if frames:
            content.insert(0, {"type": "video"})
        prompt = self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.processor.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        if frames:
            prompt = prompt.replace(self.processor.video_token, self._video_text(frames))
        return len(self.processor.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])

    def longest_prompt(self, questions: Sequence[str], frames: int) -> int:
        """Tokens of the longest of the questions' prompts with a video in it."""
        return max(self.prompt_tokens(question, frames) for question in questions)

    def _video_text(self, frames: int) -> str:
        from transformers.video_utils import VideoMetadata

        metadata = VideoMetadata(
            total_num_frames=frames, fps=1.0, duration=float(frames), frames_indices=list(range(frames))
        )
        inputs = {"pixel_values": torch.empty(1, frames, 0), "video_metadata": [metadata]}
        text: str = self.processor.replace_video_token(inputs, video_idx=0)
        return text


def write_adapter(subject: Subject, directory: Path, rank: int, seed: int | None) -> None:
    """Write an adapter in the published format that fits the subject: small random values, or zeros without a seed."""
    shapes, modules = BaseShapes.read(subject.directory), read_config(subject.hypernetwork).modules
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def factor(rows: int, columns: int, scale: float) -> torch.Tensor:
        if generator is None:
            return torch.zeros(rows, columns, dtype=torch.bfloat16)
        return (torch.randn(rows, columns, generator=generator) * scale).bfloat16()

    tensors = {}
    for layer in range(shapes.layers):
        for name, (d_in, d_out) in modules.items():
            tensors[shapes.key(layer, name, "A")] = factor(rank, d_in, d_in**-0.5)
            tensors[shapes.key(layer, name, "B")] = factor(d_out, rank, 0.1 * rank**-0.5)
    save_tensors(tensors, directory, subject.directory.name)
