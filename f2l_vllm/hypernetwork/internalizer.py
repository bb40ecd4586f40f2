"""A video file in, a LoRA adapter out: decode, sample, encode, generate, compose.

Shape suffixes: L text layers, T tokens of the internalization message, D hidden size, Q latent queries, d latent size.

Source: Frames2LoRA (arXiv 2606.04351), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from f2l_vllm.hypernetwork.adapter import Adapter
from f2l_vllm.hypernetwork.base_model import check_fit, name_of
from f2l_vllm.hypernetwork.encoder import VideoEncoder
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.video.probe import Limits
from f2l_vllm.video.sample import SampledVideo, Sampling, sample_video

Progress = Callable[[str, float], None]


class Internalizer:
    """A frozen vision-language model, its processor and a hypernetwork that fits it. Not thread-safe.

    Args:
        model: transformers SmolVLM; its device and dtype are kept.
        hyper: hypernetwork made for this model; moved to the model's device, its dtype is kept.
        processor: the model's processor; loaded from where the model came from when None.
        sampling: which frames are read; as in the hypernetwork's training when None.
        limits: which videos are accepted; the defaults of `Limits` when None.

    Raises:
        ValueError: the hypernetwork does not fit the model; the message names both.
    """

    def __init__(
        self,
        model: nn.Module,
        hyper: Hypernetwork,
        processor: Any = None,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
    ) -> None:
        check_fit(model, hyper.config)
        if processor is None:
            from transformers import AutoProcessor

            processor = AutoProcessor.from_pretrained(name_of(model))
        self.model = model.eval()
        self.hyper = hyper.to(next(model.parameters()).device).eval()
        self.processor = processor
        self.encoder = VideoEncoder(model, processor)
        self.sampling = sampling or Sampling(hyper.config.max_frames, longest_edge=hyper.config.longest_edge)
        self.limits = limits or Limits()

    @classmethod
    def load(
        cls,
        model_ref: str | Path,
        hypernetwork_ref: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
    ) -> Internalizer:
        """Load all three parts.

        Args:
            model_ref: directory or Hugging Face id of a SmolVLM.
            hypernetwork_ref: what `Hypernetwork.load` reads.
            device: a GPU when there is one, else the CPU, when None.
            dtype: of the model; its checkpoint's own when None. The hypernetwork computes in fp32 always: it is a small
                part of the work, and its output is what is published.

        Raises:
            ValueError: something cannot be read, or the parts do not fit together.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        hyper = Hypernetwork.load(hypernetwork_ref, base_model=str(model_ref))
        try:
            model: nn.Module = AutoModelForImageTextToText.from_pretrained(str(model_ref), dtype=dtype or "auto")
            processor = AutoProcessor.from_pretrained(str(model_ref))
        except OSError as error:
            raise ValueError(f"The base model {str(model_ref)!r} cannot be loaded: {error}") from error
        return cls(model.to(device), hyper, processor, sampling, limits)

    @property
    def device(self) -> torch.device:
        """Where the model and the hypernetwork compute."""
        return self.hyper.head.weight.device

    def internalize(self, path: str | Path, on_progress: Progress | None = None) -> Adapter:
        """Turn a video file into an adapter.

        Args:
            path: a local video file.
            on_progress: called with a stage ("decode", "encode", "generate", "compose") and the fraction of it that
                is done, at the start and the end of every stage and after each text layer.

        Returns:
            the adapter, on the model's device; `info` holds frames, timestamps, duration_s, width, height,
            visual_tokens, rank, and seconds per stage.

        Raises:
            VideoError: the video cannot be used; its message says why and what to do.
            FileNotFoundError: no such file.
        """
        report = on_progress or _no_progress
        report("decode", 0.0)
        started = perf_counter()
        sampled = sample_video(path, self.processor, self.limits, self.sampling)
        seconds = {"decode": perf_counter() - started}
        report("decode", 1.0)
        adapter = self.internalize_frames(sampled, report)
        adapter.info["seconds"] = seconds | adapter.info["seconds"]
        return adapter

    @torch.no_grad()
    def internalize_frames(self, sampled: SampledVideo, on_progress: Progress | None = None) -> Adapter:
        """As `internalize`, from frames that were decoded elsewhere."""
        report = on_progress or _no_progress
        report("encode", 0.0)
        start = perf_counter()
        inputs = self.encoder.prepare(sampled)
        mask_1T = inputs["attention_mask"].to(self.device).bool()
        num_layers = self.hyper.config.num_layers
        latents: list[Tensor] = []
        perceiving = 0.0

        def on_layer(index: int, features_1TD: Tensor) -> None:
            nonlocal perceiving
            began = perf_counter()
            latents.append(self.hyper.perceive(features_1TD, mask_1T))
            self._synchronize()
            perceiving += perf_counter() - began
            report("encode", (index + 1) / num_layers)

        self.encoder.visit(inputs, on_layer)
        self._synchronize()
        encoded = perf_counter()
        report("generate", 0.0)
        batched = self.hyper.project(torch.cat(latents)[None])
        factors = {name: (a[0], b[0]) for name, (a, b) in batched.items()}
        self._synchronize()
        generated = perf_counter()
        report("generate", 1.0)
        report("compose", 0.0)
        adapter = self.hyper.compose([factors])
        self._synchronize()
        adapter.info |= {
            "frames": len(sampled.frames),
            "timestamps": sampled.timestamps,
            "duration_s": sampled.info.duration_s,
            "width": sampled.info.width,
            "height": sampled.info.height,
            "visual_tokens": self.encoder.num_visual_tokens(inputs),
            "prompt_tokens": int(inputs["input_ids"].shape[1]),
            "rank": adapter.rank,
            "seconds": {
                "encode": encoded - start - perceiving,
                "generate": generated - encoded + perceiving,
                "compose": perf_counter() - generated,
            },
        }
        report("compose", 1.0)
        return adapter

    def _synchronize(self) -> None:
        """Wait for the GPU, so that each stage is charged its own seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _no_progress(stage: str, fraction: float) -> None:
    pass
