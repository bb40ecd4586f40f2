"""The frames a model's own processor would take from a video file.

Shape suffixes: N frames, H height, W width, 3 colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from f2l_vllm import torch_shims
from f2l_vllm.video.decode import Timeline, decode_frames, read_timeline, shown
from f2l_vllm.video.decoder import Decoder
from f2l_vllm.video.probe import Limits, VideoInfo, check_file

torch_shims.install()

from transformers.video_utils import VideoMetadata  # noqa: E402


@dataclass(frozen=True)
class Sampling:
    """How many frames are taken and how large they are read; None leaves it to the processor's own configuration.

    Attributes:
        max_frames: at most this many frames.
        fps: frames taken per second of video, until max_frames is reached.
        longest_edge: pixels to which the longer side is scaled, before the scaling to the model's own square size.

    Raises:
        ValueError: a value that is not positive.
    """

    max_frames: int | None = None
    fps: float | None = None
    longest_edge: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"Sampling.{name} must be positive, got {value!r}.")

    def or_else(self, default: Sampling) -> Sampling:
        """These values, with the default's in place of None."""
        return replace(default, **{name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class SampledVideo:
    """Frames ready for the processor.

    Attributes:
        frames: uint8 [N, H, W, 3], upright RGB.
        metadata: transformers' VideoMetadata with the indices the frames come from.
        info: the file's header.
        sampling: what was asked for.
    """

    frames: np.ndarray
    metadata: VideoMetadata
    info: VideoInfo
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def timestamps(self) -> list[float]:
        """Seconds into the video of every frame."""
        return [float(second) for second in self.metadata.timestamps]


def sample_video(
    path: str | Path,
    processor: Any,
    limits: Limits | None = None,
    sampling: Sampling | None = None,
    decoder: Decoder | None = None,
) -> SampledVideo:
    """Decode the frames that `processor`'s own sampler chooses; they equal what transformers decodes with PyAV.

    Args:
        path: a local file.
        processor: a transformers processor with a `video_processor`.
        limits: what is accepted; the defaults of `Limits` when None.
        sampling: replaces the processor's number of frames and rate.
        decoder: reads the file instead of this process.

    Raises:
        VideoError: the video cannot be used; its message says why and what to do.
        FileNotFoundError: no such file.
    """
    sampling = sampling or Sampling()
    source = open_source(path, limits or Limits(), decoder)
    return source.take(source.indices(processor, sampling, 0, source.info.frame_count), sampling)


@dataclass(frozen=True)
class Source:
    """A checked video file, and how frames are taken from it.

    Attributes:
        info: the header, with frames and duration as they are shown.
        timeline: when each frame is shown, or None if the packets do not say or `decoder` keeps it.
        decoder: reads the file instead of this process.
    """

    path: Path
    info: VideoInfo
    timeline: Timeline | None
    decoder: Decoder | None = None

    def indices(self, processor: Any, sampling: Sampling, first: int, end: int) -> list[int]:
        """The frames that the processor's own sampler takes from the frames `first` to `end` (exclusive)."""
        sampler = processor.video_processor
        chosen = sampler.sample_frames(
            metadata=self._metadata(end - first),
            num_frames=sampling.max_frames or sampler.num_frames,
            fps=sampling.fps or sampler.fps,
        )
        return [first + int(index) for index in chosen]

    def take(self, indices: list[int], sampling: Sampling) -> SampledVideo:
        """Decode these frames; their timestamps count from the start of the whole video."""
        metadata = self._metadata(self.info.frame_count)
        metadata.frames_indices = list(indices)
        return SampledVideo(self._decode(indices), metadata, self.info, sampling)

    def _decode(self, indices: Sequence[int]) -> np.ndarray:
        count = self.info.frame_count
        if self.decoder is not None:
            return self.decoder.frames(self.path, indices, count)
        return decode_frames(self.path, indices, count, self.timeline)

    def _metadata(self, frames: int) -> VideoMetadata:
        info = self.info
        return VideoMetadata(
            total_num_frames=frames,
            fps=info.fps,
            width=info.width,
            height=info.height,
            duration=float(frames / Fraction(info.fps).limit_denominator(2**20)),  # rounds as transformers does
            video_backend="pyav",
        )


def open_source(path: str | Path, limits: Limits, decoder: Decoder | None = None) -> Source:
    """Probe and check a video file, in this process or in the decoder's.

    Raises:
        VideoError: the video cannot be used; its message says why and what to do.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if decoder is not None:
        return Source(path, decoder.open(path, limits), None, decoder)
    info = check_file(path, limits)
    timeline = read_timeline(path)
    return Source(path, shown(info, timeline), timeline)
