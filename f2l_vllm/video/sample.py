"""The frames a model's own processor would take from a video file.

Shape suffixes: N frames, H height, W width, 3 colours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from f2l_vllm import torch_shims
from f2l_vllm.video.decode import TOLERATED_MISSING, decode_frames, read_timeline
from f2l_vllm.video.probe import Limits, VideoInfo, check, check_size, probe

torch_shims.install()

from transformers.video_utils import VideoMetadata  # noqa: E402


@dataclass(frozen=True)
class Sampling:
    """How many frames are taken and how large they are read; None leaves it to the processor's own configuration.

    Attributes:
        max_frames: at most this many frames.
        fps: frames taken per second of video, until max_frames is reached.
        longest_edge: pixels the longer side is scaled to before the model's own square size.

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
    path: str | Path, processor: Any, limits: Limits | None = None, sampling: Sampling | None = None
) -> SampledVideo:
    """Decode the frames that `processor`'s own sampler chooses; they equal what transformers decodes with PyAV.

    Args:
        path: a local file.
        processor: a transformers processor with a `video_processor`.
        limits: what is accepted; the defaults of `Limits` when None.
        sampling: replaces the processor's number of frames and rate.

    Raises:
        VideoError: the video cannot be used; its message says why and what to do.
        FileNotFoundError: no such file.
    """
    limits, sampling = limits or Limits(), sampling or Sampling()
    check_size(Path(path).stat().st_size, limits)
    info = probe(path)
    check(info, limits)
    timeline = read_timeline(path)
    if timeline is not None and timeline.hidden > TOLERATED_MISSING:
        shown = len(timeline.times)
        info = replace(info, frame_count=shown, duration_s=shown / info.fps)
    metadata = VideoMetadata(
        total_num_frames=info.frame_count,
        fps=info.fps,
        width=info.width,
        height=info.height,
        duration=float(info.frame_count / Fraction(info.fps).limit_denominator(2**20)),  # rounds as transformers does
        video_backend="pyav",
    )
    sampler = processor.video_processor
    metadata.frames_indices = sampler.sample_frames(
        metadata=metadata,
        num_frames=sampling.max_frames or sampler.num_frames,
        fps=sampling.fps or sampler.fps,
    )
    indices = [int(index) for index in metadata.frames_indices]
    frames_NHW3 = decode_frames(path, indices, info.frame_count, timeline)
    return SampledVideo(frames_NHW3, metadata, info, sampling)
