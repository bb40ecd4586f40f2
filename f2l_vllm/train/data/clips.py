"""The clip an example is about: a whole video file, or a span of one.

A span is read as if it were a file of its own: the model's sampler sees only the span, and the times in the prompt
count from the span's start. Decoding and sampling are the same as for whole videos.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from f2l_vllm.files import atomic_path
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.train.data.shards import video_file
from f2l_vllm.video.decode import TOLERATED_MISSING
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import Limits, VideoInfo
from f2l_vllm.video.sample import SampledVideo, Sampling, Source, open_source, sample_video

MISSING, OUTSIDE = "file_not_found", "span_outside_video"
_BYTES_AT_ONCE = 1 << 28  # decoded frames held while a clip is written
_SPAN_TOLERANCE_S = 0.1  # durations in metadata are rounded; asking for a few frames too many does no harm


class UnusableVideoError(ValueError):
    """An example's video, or its span, cannot be used; the example is to be left out.

    Attributes:
        code: one of `f2l_vllm.video.errors.CODES`, `file_not_found` or `span_outside_video`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def open_example(example: Example, processor: Any, sampling: Sampling | None = None) -> SampledVideo:
    """Decode the frames of an example's video, or of its span.

    Args:
        processor: a transformers processor with a `video_processor`.
        sampling: replaces the processor's number of frames and rate.

    Raises:
        UnusableVideoError: the file is missing or not a usable video, or the span does not lie inside it.
        ValueError: the tar file that holds the video cannot be read.
    """
    with video_file(example) as path, unusable(example.video_path):
        if example.span is None:
            return sample_video(path, processor, sampling=sampling)
        sampling = sampling or Sampling()
        source = open_source(path, Limits())
        first, end = frames_of(example.span, source.info)
        indices = source.indices(processor, sampling, first, end)
        whole = source.take(indices, sampling)
    seconds = float((end - first) / Fraction(whole.info.fps).limit_denominator(2**20))
    metadata = replace(
        whole.metadata,
        total_num_frames=end - first,
        duration=seconds,
        frames_indices=[index - first for index in indices],
    )
    return replace(whole, metadata=metadata, info=replace(whole.info, frame_count=end - first, duration_s=seconds))


def clip_file(example: Example, folder: Path) -> Path:
    """A file that holds nothing but the example's clip: the video itself, or the span, encoded anew into `folder`.

    For servers, which take files. The clip has the frames and the rate that `open_example` reads, without sound, in
    H.264 of a quality that hides the second encoding. It is written once.

    Raises:
        UnusableVideoError: as `open_example`.
    """
    if example.span is None:
        if not example.video_path.is_file():
            raise UnusableVideoError(MISSING, f"There is no file {example.video_path}.")
        return example.video_path
    name = hashlib.sha256(f"{os.path.abspath(example.video_path)} {example.span}".encode()).hexdigest()[:32]
    target = folder / f"{name}.mp4"
    if not target.exists():
        with unusable(example.video_path):
            source = open_source(example.video_path, Limits())
            first, end = frames_of(example.span, source.info)
            with atomic_path(target) as staging:
                _write(source, first, end, staging)
    return target


def frames_of(span: tuple[float, float], info: VideoInfo) -> tuple[int, int]:
    """The frames of a span in seconds: first and end (exclusive). Spans that meet share no frame.

    Raises:
        UnusableVideoError: the span does not lie inside the video.
    """
    start, end = span
    seconds = info.frame_count / info.fps
    first, last = round(start * info.fps), min(round(end * info.fps), info.frame_count)
    if end > seconds + _SPAN_TOLERANCE_S or first >= last:
        raise UnusableVideoError(
            OUTSIDE,
            f"The span {start:g} to {end:g} s holds no frames of a video of {seconds:.2f} s, or passes its end.",
        )
    return first, last


def check_complete(source: Source) -> None:
    """Compare the number of frames in a file with the number its header claims, without decoding any.

    Raises:
        VideoError: truncated_video.
    """
    if source.timeline is not None and len(source.timeline.times) < source.info.frame_count - TOLERATED_MISSING:
        raise VideoError(
            "truncated_video",
            f"The video claims {source.info.frame_count} frames but holds {len(source.timeline.times)}; get the "
            "complete file.",
        )


@contextmanager
def unusable(path: Path) -> Iterator[None]:
    """Raise whatever is wrong with a video file as an `UnusableVideoError`."""
    try:
        yield
    except VideoError as error:
        raise UnusableVideoError(error.code, error.message) from error
    except FileNotFoundError as error:
        raise UnusableVideoError(MISSING, f"There is no file {path}.") from error
    except OSError as error:
        raise UnusableVideoError("not_a_video", f"{path} cannot be read: {error.strerror or error}.") from error


def _write(source: Source, first: int, end: int, path: Path) -> None:
    info = source.info
    block = max(16, _BYTES_AT_ONCE // (3 * info.width * info.height))
    with av.open(str(path), "w") as container:
        rate = Fraction(info.fps).limit_denominator(2**20)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "veryfast"})
        for start in range(first, end, block):
            frames_NHW3 = source.take(list(range(start, min(start + block, end))), Sampling()).frames
            if start == first:
                _, stream.height, stream.width, _ = frames_NHW3.shape
                odd = stream.height % 2 or stream.width % 2
                stream.pix_fmt = "yuv444p" if odd else "yuv420p"  # 4:2:0 halves both sides
            for image_HW3 in frames_NHW3:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HW3), format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
