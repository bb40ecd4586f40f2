"""A video file in, a LoRA adapter out: decode, sample, encode, generate, compose.

Shape suffixes: B videos of one pass, T tokens of the internalization message, D hidden size, Q latent queries, d latent
size, V visual tokens.

Source: Frames2LoRA (arXiv 2606.04351), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from f2l_vllm.base_models.text_layers import check_length, name_of
from f2l_vllm.hypernetwork.adapter import Adapter, Factors
from f2l_vllm.hypernetwork.batching import group_by_length, run_groups
from f2l_vllm.hypernetwork.encoder import VideoEncoder, pad_mask
from f2l_vllm.hypernetwork.fit import check_fit
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.hypernetwork.precision import reading_dtype
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.video.chunks import ChunkedVideo, Chunking, cut_video
from f2l_vllm.video.decoder import Decoder
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import Limits
from f2l_vllm.video.reading import ReadingOptions
from f2l_vllm.video.sample import SampledVideo, Sampling, sample_video

TOKENS_PER_PASS = 16384  # about sixteen videos as the released checkpoints sample them

Progress = Callable[[str, float], None]


class NotEnoughMemoryError(MemoryError):
    """Some videos need more memory than is available, even alone.

    Attributes:
        adapters: the adapters of all videos, in order; None for those that failed.
    """

    def __init__(self, adapters: list[Adapter | None], tokens: dict[int, int]) -> None:
        many = ", ".join(f"video {index} ({count} tokens)" for index, count in sorted(tokens.items()))
        super().__init__(
            f"There is not enough memory for {many}, even one at a time. Sample fewer frames of it, compute in "
            "bfloat16, or give the process more memory; the other videos' adapters are in this error's `adapters`."
        )
        self.adapters = adapters


@dataclass
class _Generated:
    """One video's factors, before the learned bias is appended, and its part of `Adapter.info`."""

    factors: Factors
    info: AdapterInfo


class Internalizer:
    """A frozen vision-language model, its processor and a hypernetwork that fits it. Not thread-safe.

    Args:
        model: a transformers model of a known family; its device and dtype are kept.
        hyper: hypernetwork made for this model; moved to the model's device, its dtype is kept.
        processor: the model's processor; when None, loaded from where the model came from.
        reading: how videos are read.
        limits: which videos are accepted; the defaults of `Limits` when None.

    Attributes:
        sampling: which frames are read: the options', and for what they leave open those of the hypernetwork's
            training; may be set.
        decoder: reads video files instead of this process; may be set.

    Raises:
        ValueError: the hypernetwork does not fit the model (the message names both), or the rate is outside [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        hyper: Hypernetwork,
        processor: Any = None,
        reading: ReadingOptions | None = None,
        limits: Limits | None = None,
    ) -> None:
        check_fit(model, hyper.config)
        if processor is None:
            from transformers import AutoProcessor

            processor = AutoProcessor.from_pretrained(name_of(model))
        self.model = model.eval()
        self.hyper = hyper.to(next(model.parameters()).device).eval()
        self.processor = processor
        self.reading = reading or ReadingOptions()
        self.encoder = VideoEncoder(model, processor, self.reading.merge_rate)
        trained = Sampling(hyper.config.max_frames, longest_edge=hyper.config.longest_edge)
        self.sampling = Sampling(self.reading.max_frames, self.reading.fps).or_else(trained)
        self.limits = limits or Limits()
        self.decoder: Decoder | None = None

    @classmethod
    def load(
        cls,
        model_ref: str | Path,
        hypernetwork_ref: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reading: ReadingOptions | None = None,
        limits: Limits | None = None,
    ) -> Internalizer:
        """Load all three parts.

        Args:
            model_ref: directory or Hugging Face id of a base model.
            hypernetwork_ref: what `Hypernetwork.load` reads.
            device: when None, a GPU if there is one, else the CPU.
            dtype: of the model; when None, `precision.reading_dtype` of the device, else its checkpoint's own. The
                hypernetwork always computes in fp32: it is a small part of the work, and its output is published.

        Raises:
            ValueError: something cannot be read, or the parts do not fit together.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        read_in = dtype or reading_dtype(torch.device(device)) or "auto"
        hyper = Hypernetwork.load(hypernetwork_ref, base_model=str(model_ref))
        try:
            model: nn.Module = AutoModelForImageTextToText.from_pretrained(str(model_ref), dtype=read_in)
            processor = AutoProcessor.from_pretrained(str(model_ref))
        except OSError as error:
            raise ValueError(f"The base model {str(model_ref)!r} cannot be loaded: {error}") from error
        return cls(model.to(device), hyper, processor, reading, limits)

    @property
    def device(self) -> torch.device:
        """Where the model and the hypernetwork compute."""
        return self.hyper.head.weight.device

    def internalize(
        self, path: str | Path, on_progress: Progress | None = None, chunking: Chunking | None = None
    ) -> Adapter:
        """Turn a video file into an adapter.

        Args:
            path: a local video file.
            chunking: cut the video and compose the chunks' adapters in rank space, with the bias once; as the reading
                options say when None.
            on_progress: called with a stage ("decode", "encode", "generate", "compose") and the part of it that is
                done, at the start and the end of every stage and after each text layer. A GPU is not waited for
                before the end of "generate": until then it is the part that it has been given to do.

        Returns:
            the adapter, on the model's device.

        Raises:
            VideoError: the video cannot be used; its message says why and what to do.
            FileNotFoundError: no such file.
        """
        report = on_progress or _no_progress
        report("decode", 0.0)
        chunking = chunking or Chunking.of(self.reading)
        if chunking is not None:
            return self._internalize_chunks(
                cut_video(path, self.processor, chunking, self.limits, self.sampling, self.decoder), report
            )
        started = perf_counter()
        sampled = sample_video(path, self.processor, self.limits, self.sampling, self.decoder)
        decoding = perf_counter() - started
        report("decode", 1.0)
        adapter = self.internalize_frames(sampled, report)
        adapter.info = adapter.info.decoded_in(decoding)
        return adapter

    def internalize_frames(self, sampled: SampledVideo, on_progress: Progress | None = None) -> Adapter:
        """As `internalize`, from frames that were decoded elsewhere."""
        report = on_progress or _no_progress
        (generated,) = self._run([sampled], [self.tokens(sampled)], report)
        report("compose", 0.0)
        adapter = self._compose([generated])
        report("compose", 1.0)
        return adapter

    def internalize_many(self, videos: Sequence[SampledVideo], max_tokens: int | None = None) -> list[Adapter]:
        """One adapter per video, several videos in each pass through the models.

        A pass that runs out of memory is split and tried again.

        Args:
            videos: sampled videos of any lengths.
            max_tokens: of all videos in one pass, padding included; `TOKENS_PER_PASS` when None. A longer video gets
                a pass of its own.

        Returns:
            the adapters in the order of the videos, as `internalize_frames` returns them one at a time. In `info`,
            `seconds` is the video's share of its pass.

        Raises:
            NotEnoughMemoryError: a video does not fit even alone; the error holds the others' adapters.
            VideoError: `video_too_long`, of any of them: `tokens` tells which.
            ValueError: `max_tokens` is not positive.
        """
        return [self._compose([generated]) for generated in self._generate(videos, max_tokens)]

    def internalize_chunks(self, chunks: Sequence[SampledVideo], max_tokens: int | None = None) -> Adapter:
        """One adapter of rank (K + 1) R from K chunks of a video, or from K videos, in joint passes.

        Args, raises: as `internalize_many`. In `info`, counts and seconds are sums and `chunks` is K.
        """
        return self._compose(self._generate(chunks, max_tokens))

    def _internalize_chunks(self, chunked: ChunkedVideo, report: Progress) -> Adapter:
        """Decode and read one chunk after the other, so that only one chunk's frames are held; then compose."""
        generated: list[_Generated] = []

        def part(stage: str, fraction: float) -> None:
            if stage == "encode":
                report(stage, (len(generated) + fraction) / len(chunked))

        for index in range(len(chunked)):
            started = perf_counter()
            sampled = chunked.decode(index)
            decoding = perf_counter() - started
            if index == 0:
                report("decode", 1.0)
            (one,) = self._run([sampled], [self.tokens(sampled)], part)
            generated.append(_Generated(one.factors, one.info.decoded_in(decoding)))
        report("generate", 1.0)
        report("compose", 0.0)
        adapter = self._compose(generated)
        adapter.spans = tuple(chunked.spans)
        adapter.info = replace(adapter.info, spans=adapter.spans)
        report("compose", 1.0)
        return adapter

    def tokens(self, sampled: SampledVideo) -> Tensor:
        """The token ids that the text layers read for this video.

        Raises:
            VideoError: `video_too_long`: more than the model reads.
        """
        ids = self.encoder.tokens(sampled)
        try:
            check_length(self.model, len(ids))
        except ValueError as error:
            raise VideoError("video_too_long", f"{error}; or cut it into chunks") from error
        return ids

    def _generate(self, videos: Sequence[SampledVideo], max_tokens: int | None) -> list[_Generated]:
        ids = [self.tokens(sampled) for sampled in videos]
        lengths = [len(one) for one in ids]

        def run(group: Sequence[int]) -> list[_Generated]:
            return self._run([videos[index] for index in group], [ids[index] for index in group], _no_progress)

        groups = group_by_length(lengths, TOKENS_PER_PASS if max_tokens is None else max_tokens)
        results, failures = run_groups(groups, run)
        if failures:
            adapters = [self._compose([results[i]]) if i in results else None for i in range(len(videos))]
            first = next(iter(failures.values()))
            raise NotEnoughMemoryError(adapters, {index: lengths[index] for index in failures}) from first
        return [results[index] for index in range(len(videos))]

    @torch.no_grad()
    def _run(self, videos: Sequence[SampledVideo], ids: Sequence[Tensor], report: Progress) -> list[_Generated]:
        """One pass over all these videos."""
        clock = _Clock(self.device)
        report("encode", 0.0)
        visual = [self.encoder.see(sampled) for sampled in videos]
        clock.lap("vision")
        num_layers = self.hyper.config.num_layers
        mask_BT = None if len(videos) == 1 else pad_mask([len(one) for one in ids]).to(self.device)
        reader = self.hyper.reader(mask_BT)

        def on_layer(index: int, features_BTD: Tensor) -> None:
            clock.lap("text")
            reader.add(features_BTD)
            clock.lap("perceiver")
            report("encode", (index + 1) / num_layers)

        self.encoder.read(ids, visual, on_layer)
        report("generate", 0.0)
        latents_BLQd = reader.latents()
        clock.lap("perceiver")
        factors = self.hyper.project(latents_BLQd)
        clock.lap("head")
        seconds = clock.seconds()
        report("generate", 1.0)
        return [
            _Generated(
                {name: (a[row], b[row]) for name, (a, b) in factors.items()},
                AdapterInfo(
                    frames=len(sampled.frames),
                    timestamps=tuple(sampled.timestamps),
                    duration_s=sampled.info.duration_s,
                    width=sampled.info.width,
                    height=sampled.info.height,
                    visual_tokens=len(visual[row]),
                    merge_rate=self.encoder.merge_rate,
                    prompt_tokens=len(ids[row]),
                    seconds={stage: taken / len(videos) for stage, taken in seconds.items()},
                ),
            )
            for row, sampled in enumerate(videos)
        ]

    def _compose(self, chunks: Sequence[_Generated]) -> Adapter:
        adapter = self.hyper.compose([chunk.factors for chunk in chunks])
        infos = [chunk.info for chunk in chunks]
        adapter.info = replace(
            infos[0],
            frames=sum(one.frames for one in infos),
            timestamps=tuple(second for one in infos for second in one.timestamps),
            visual_tokens=sum(one.visual_tokens for one in infos),
            prompt_tokens=sum(one.prompt_tokens for one in infos),
            seconds={stage: sum(one.seconds[stage] for one in infos) for stage in infos[0].seconds},
            chunks=len(infos) if len(infos) > 1 else 0,
            rank=adapter.rank,
        )
        return adapter


class _Clock:
    """Charges each stage its own seconds; a GPU marks the laps itself and is waited for once, at the end."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._stages: list[str] = []
        self._marks: list[Any] = [self._mark()]

    def lap(self, stage: str) -> None:
        """Charge what was asked for since the last lap to `stage`."""
        self._stages.append(stage)
        self._marks.append(self._mark())

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage; waits for the last lap."""
        if self._stream is not None:
            self._marks[-1].synchronize()
        seconds = dict.fromkeys(self._stages, 0.0)
        for stage, (before, after) in zip(self._stages, pairwise(self._marks), strict=True):
            seconds[stage] += after - before if self._stream is None else before.elapsed_time(after) / 1000
        return seconds

    def _mark(self) -> Any:
        if self._stream is None:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


def _no_progress(stage: str, fraction: float) -> None:
    pass
