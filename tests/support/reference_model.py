"""What transformers and peft answer, to compare an engine with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import load_video


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


class Reference:
    """A checkpoint in transformers, in fp32, and adapters on it by name."""

    def __init__(self, checkpoint: Path, adapters: dict[str, Path]) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self._base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._adapted: Any = None
        for name, path in adapters.items():
            if self._adapted is None:
                self._adapted = PeftModel.from_pretrained(self._base, path, adapter_name=name).eval()
            else:
                self._adapted.load_adapter(path, adapter_name=name)

    def chat(self, content: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Model inputs for one user turn, whose parts may be text, `image` (PIL) and `path` of a video.

        Videos are decoded by transformers' PyAV reader, for its default one needs a library that is not required.
        """
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        sampler = self.processor.video_processor.sample_frames
        videos = [
            load_video(part["path"], backend="pyav", sample_indices_fn=lambda metadata, **_: sampler(metadata))
            for part in content
            if part["type"] == "video"
        ]
        media: dict[str, Any] = {}
        if images := [part["image"] for part in content if part["type"] == "image"]:
            media["images"] = images
        if videos:
            media["videos"] = [[frames for frames, _ in videos]]
            media["video_metadata"] = [metadata for _, metadata in videos]
            media["do_sample_frames"] = False
        return self.processor(text=prompt, return_tensors="pt", **media)

    @torch.inference_mode()
    def answer(self, inputs: dict[str, torch.Tensor], max_tokens: int, adapter: str | None = None) -> Answer:
        """Decode greedily, past the end of the utterance."""
        if self._adapted is None:
            return self._decode(self._base, inputs, max_tokens)
        if adapter is None:
            with self._adapted.disable_adapter():
                return self._decode(self._adapted, inputs, max_tokens)
        self._adapted.set_adapter(adapter)
        return self._decode(self._adapted, inputs, max_tokens)

    @staticmethod
    def _decode(model: Any, inputs: dict[str, torch.Tensor], max_tokens: int) -> Answer:
        tokens, logprobs = [], []
        output = model(**inputs, use_cache=True)
        for _ in range(max_tokens):
            row = torch.log_softmax(output.logits[0, -1].float(), dim=-1)
            tokens.append(int(row.argmax()))
            logprobs.append(float(row.max()))
            output = model(
                input_ids=torch.tensor([[tokens[-1]]]), past_key_values=output.past_key_values, use_cache=True
            )
        return Answer(tokens, logprobs)
