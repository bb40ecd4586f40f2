"""Cuts a long video into consecutive chunks; each is sampled separately, so that each can have its own adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from f2l_vllm.video.decoder import Decoder
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import Limits
from f2l_vllm.video.reading import ReadingOptions
from f2l_vllm.video.sample import SampledVideo, Sampling, Source, open_source


@dataclass(frozen=True)
class Chunking:
    """How a video is cut: by time or by sampled frames, into at most `max_chunks`.

    Attributes:
        seconds: a chunk covers this much of the video; the sampler takes up to its usual number of frames from each.
        frames: a chunk holds this many sampled frames, taken from the whole video at the sampler's rate.
        max_chunks: as many as the server's LoRA rank has room for.

    Raises:
        ValueError: neither or both of `seconds` and `frames`, or a value that is not positive.
    """

    seconds: float | None = None
    frames: int | None = None
    max_chunks: int = 1

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.frames is None):
            raise ValueError("A video is cut either by seconds or by frames: give exactly one of them.")
        for name in ("seconds", "frames", "max_chunks"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Chunking.{name} must be positive, got {value!r}.")

    @classmethod
    def of(cls, reading: ReadingOptions) -> Chunking | None:
        """As the options say; None: the video is read in one pass."""
        return cls(reading.chunk_seconds, reading.chunk_frames, reading.max_chunks) if reading.is_chunked else None


@dataclass(frozen=True)
class ChunkedVideo:
    """A video file cut into chunks that are decoded one at a time."""

    source: Source
    sampling: Sampling
    indices: Sequence[list[int]]
    spans: Sequence[tuple[float, float]]

    def __len__(self) -> int:
        return len(self.indices)

    def decode(self, chunk: int) -> SampledVideo:
        """The frames of one chunk, with their times in the whole video."""
        return self.source.take(self.indices[chunk], self.sampling)


def cut_video(
    path: str | Path,
    processor: Any,
    chunking: Chunking,
    limits: Limits | None = None,
    sampling: Sampling | None = None,
    decoder: Decoder | None = None,
) -> ChunkedVideo:
    """Plan the chunks of a video file; spans are (start, end) in seconds and cover the whole video.

    Raises:
        VideoError: as `sample_video`, and video_too_long: more chunks than `max_chunks`.
    """
    sampling = sampling or Sampling()
    source = open_source(path, limits or Limits(), decoder)
    if chunking.seconds is not None:
        plan = _by_seconds(source, processor, chunking.seconds, chunking.max_chunks, sampling)
    else:
        assert chunking.frames is not None
        plan = _by_frames(source, processor, chunking.frames, chunking.max_chunks, sampling)
    indices, starts = plan
    total = source.info.frame_count / source.info.fps
    edges = [*(start / source.info.fps for start in starts), total]
    return ChunkedVideo(source, sampling, indices, list(pairwise(edges)))


def _by_seconds(
    source: Source, processor: Any, seconds: float, max_chunks: int, sampling: Sampling
) -> tuple[list[list[int]], list[int]]:
    fps, count = source.info.fps, source.info.frame_count
    # A remainder too short for its own sampled frame belongs to the chunk before it.
    rate = sampling.fps or processor.video_processor.fps
    whole = math.floor(count / fps / seconds + 1e-6)
    rest = count / fps - whole * seconds
    needed = max(1, whole + (rest * rate >= 1))
    if needed > max_chunks:
        raise _too_long(
            f"{needed} chunks of {seconds:g} s", max_chunks, f"--chunk-seconds {math.ceil(count / fps / max_chunks)}"
        )
    starts = [round(chunk * seconds * fps) for chunk in range(needed)]
    ends = [*starts[1:], count]
    indices = [source.indices(processor, sampling, a, b) for a, b in zip(starts, ends, strict=True)]
    return indices, starts


def _by_frames(
    source: Source, processor: Any, frames: int, max_chunks: int, sampling: Sampling
) -> tuple[list[list[int]], list[int]]:
    rate = sampling.fps or processor.video_processor.fps
    wanted = max(1, round(source.info.frame_count / source.info.fps * rate))
    needed = math.ceil(wanted / frames)
    if needed > max_chunks:
        raise _too_long(
            f"{needed} chunks of {frames} frames at {rate:g} frames/s",
            max_chunks,
            f"--chunk-frames {math.ceil(wanted / max_chunks)}",
        )
    whole = Sampling(max_frames=wanted, fps=sampling.fps, longest_edge=sampling.longest_edge)
    chosen = source.indices(processor, whole, 0, source.info.frame_count)
    indices = [chosen[start : start + frames] for start in range(0, len(chosen), frames)]
    return indices, [0, *(chunk[0] for chunk in indices[1:])]


def _too_long(needs: str, max_chunks: int, enough: str) -> VideoError:
    return VideoError(
        "video_too_long",
        f"The video needs {needs}, and the server's LoRA rank has room for {max_chunks}. Cut the video, or start the "
        f"server with {enough} or more, or without chunks (one pass over a fixed number of frames).",
    )
