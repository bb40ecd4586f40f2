"""What transformers and peft answer, to compare an engine with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import load_video


@dataclass(frozen=True)
class Generated:
    """A greedy answer: its tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Followed:
    """Given tokens under the reference: the log-probability of each, and of the likeliest token in its place."""

    logprobs: list[float]
    best: list[float]


class Reference:
    """A checkpoint in transformers, and adapters on it by name.

    Args:
        checkpoint: directory of a vision-language model.
        adapters: PEFT directories by name.
        dtype, device: of the model and the adapters.
    """

    def __init__(
        self,
        checkpoint: Path,
        adapters: dict[str, Path],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        base: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype)
        self._base = base.to(device).eval()
        self._adapted: Any = None
        options: Any = {"autocast_adapter_dtype": dtype == torch.float32}  # else peft computes every adapter in fp32
        for name, path in adapters.items():
            if self._adapted is None:
                self._adapted = PeftModel.from_pretrained(self._base, path, adapter_name=name, **options).eval()
            else:
                self._adapted.load_adapter(path, adapter_name=name, **options)

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
        inputs: dict[str, torch.Tensor] = self.processor(text=prompt, return_tensors="pt", **media)
        return inputs

    @torch.inference_mode()
    def answer(self, inputs: dict[str, torch.Tensor], max_tokens: int, adapter: str | None = None) -> Generated:
        """Decode greedily, past the end of the utterance."""
        if self._adapted is None:
            return self._decode(self._base, inputs, max_tokens)
        if adapter is None:
            with self._adapted.disable_adapter():
                return self._decode(self._adapted, inputs, max_tokens)
        self._adapted.set_adapter(adapter)
        return self._decode(self._adapted, inputs, max_tokens)

    @torch.inference_mode()
    def follow(self, inputs: dict[str, torch.Tensor], tokens: Sequence[int], adapter: str | None = None) -> Followed:
        """How likely these tokens are as the answer, read in one pass."""
        ids = torch.cat([inputs["input_ids"], torch.tensor([list(tokens)])], dim=1)
        device, dtype = self._base.device, self._base.dtype
        media = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if name not in ("input_ids", "attention_mask")
        }
        model = self._base if self._adapted is None else self._adapted
        if adapter is not None:
            model.set_adapter(adapter)
        if adapter is None and self._adapted is not None:
            with model.disable_adapter():
                logits = model(input_ids=ids.to(device), **media).logits
        else:
            logits = model(input_ids=ids.to(device), **media).logits
        rows = torch.log_softmax(logits[0, -len(tokens) - 1 : -1].float(), dim=-1).cpu()
        return Followed(
            rows[torch.arange(len(tokens)), torch.tensor(list(tokens))].tolist(), rows.max(dim=-1).values.tolist()
        )

    @staticmethod
    def _decode(model: Any, inputs: dict[str, torch.Tensor], max_tokens: int) -> Generated:
        tokens, logprobs = [], []
        output = model(**inputs, use_cache=True)
        for _ in range(max_tokens):
            row = torch.log_softmax(output.logits[0, -1].float(), dim=-1)
            tokens.append(int(row.argmax()))
            logprobs.append(float(row.max()))
            output = model(
                input_ids=torch.tensor([[tokens[-1]]]), past_key_values=output.past_key_values, use_cache=True
            )
        return Generated(tokens, logprobs)
