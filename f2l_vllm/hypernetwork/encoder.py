"""The frozen vision-language model reads a video once; what enters each of its text layers is the hypernetwork's input.

Shape suffixes: B batch, L text layers, T tokens of the internalization message, D hidden size.

Source: Frames2LoRA (arXiv 2606.04351), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from f2l_vllm.hypernetwork.base_model import text_layers_of, text_model_of
from f2l_vllm.video.sample import SampledVideo

INSTRUCTION = "Internalize this video for later captioning."


class _AllLayersSeen(Exception):
    """Ends a forward pass where the last text layer would begin: nothing after its input is used."""


class VideoEncoder:
    """A transformers SmolVLM and its processor, used only to read videos. Not thread-safe: it hooks the model.

    Args:
        model: SmolVLMForConditionalGeneration or SmolVLMModel; frozen, its dtype and device are kept.
        processor: the model's processor.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.layers = text_layers_of(model)

    def prepare(self, sampled: SampledVideo) -> BatchFeature:
        """Token ids and pixels of the internalization message: one user turn with the video and `INSTRUCTION`.

        Returns:
            input_ids, attention_mask [1, T], pixel_values [1, frames, 3, S, S] and what else the processor adds,
            on the CPU.
        """
        message = {
            "role": "user",
            "content": [{"type": "video", "video": sampled.frames}, {"type": "text", "text": INSTRUCTION}],
        }
        options: dict[str, Any] = {"do_sample_frames": False, "video_metadata": [[sampled.metadata]]}
        if sampled.sampling.longest_edge is not None:
            options["size"] = {"longest_edge": sampled.sampling.longest_edge}
        inputs = self.processor.apply_chat_template(
            [message],
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        return BatchFeature({name: value for name, value in inputs.items() if isinstance(value, Tensor)})

    def num_visual_tokens(self, inputs: BatchFeature) -> int:
        """Positions of the message that hold a piece of a frame."""
        return int((inputs["input_ids"] == self.processor.image_token_id).sum())

    def features(self, inputs: BatchFeature) -> tuple[Tensor, Tensor]:
        """What enters each text layer.

        Args:
            inputs: input_ids, attention_mask [B, T] and pixel_values; on any device.

        Returns:
            features [B, L, T, D] in the model's dtype and mask [B, T], True where a token is real.
        """
        collected: list[Tensor] = []
        self.visit(inputs, lambda _, features_BTD: collected.append(features_BTD))
        return torch.stack(collected, dim=1), inputs["attention_mask"].to(collected[0].device).bool()

    @torch.no_grad()
    def visit(self, inputs: BatchFeature, on_layer: Callable[[int, Tensor], None]) -> None:
        """Call `on_layer(index, features [B, T, D])` as each text layer is entered, holding none of them afterwards.

        The last layer's own work, the final norm and the language-model head do not run, and no key or value is kept.
        """
        parameter = next(self.model.parameters())
        moved = {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        last = len(self.layers) - 1

        def hook(index: int) -> Callable[..., None]:
            def enter(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                on_layer(index, args[0] if args else kwargs["hidden_states"])
                if index == last:
                    raise _AllLayersSeen

            return enter

        with ExitStack() as hooks:
            for index, layer in enumerate(self.layers):
                hooks.callback(layer.register_forward_pre_hook(hook(index), with_kwargs=True).remove)
            try:
                inner = getattr(self.model, "model", self.model)
                inner(**moved, use_cache=False)
            except _AllLayersSeen:
                return
        raise AssertionError(f"{type(text_model_of(self.model)).__name__} did not run its layers")
