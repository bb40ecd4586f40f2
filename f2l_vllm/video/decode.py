"""Selected frames of a video, decoding as little as possible.

An index counts frames in presentation order, the order of a decoder's output. The packets' timestamps identify the
frame and the keyframe from which to decode; if they do not, everything up to the last index is decoded and counted.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import av
import av.container
import av.video.stream
import numpy as np

from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import VideoInfo, open_video

TOLERATED_MISSING = 4  # headers also count frames that an edit list hides or a decoder keeps back at the very end


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown.

    Attributes:
        times: presentation time of every shown frame, ascending, in the stream's time base.
        keyframes: presentation times that decoding can start from, ascending.
        hidden: number of frames in the file that an edit list leaves out.
    """

    times: list[int]
    keyframes: list[int]
    hidden: int


def decode_frames(
    path: str | Path,
    indices: Sequence[int],
    frame_count: int,
    timeline: Timeline | None = None,
    max_bytes: int | None = None,
) -> np.ndarray:
    """Decode the frames at ascending `indices` of a video that claims to show `frame_count` frames.

    Frames missing at the very end (at most `TOLERATED_MISSING`) are replaced by the last existing one.

    Args:
        timeline: from `read_timeline`; without it everything up to the last index is decoded.
        max_bytes: limit of the result; None for no limit.

    Returns:
        uint8 [len(indices), H, W, 3], upright RGB, all in the size of the first frame.

    Raises:
        VideoError: truncated_video, no_frames, video_too_large_to_decode, and those of `open_video`.
    """
    assert list(indices) == sorted(indices), indices
    assert len(indices) > 0, "no frame was asked for"
    if timeline is not None:
        _check_complete(len(timeline.times), frame_count)
        wanted = _positions(timeline.times[min(index, len(timeline.times) - 1)] for index in indices)
        canvas = _Canvas(len(indices), max_bytes)
        with open_video(path) as (container, stream):
            if _decode_by_seeking(container, stream, wanted, timeline.keyframes, canvas):
                return canvas.frames()
    canvas = _Canvas(len(indices), max_bytes)
    with open_video(path) as (container, stream):
        decoded = _decode_by_counting(container, stream, _positions(indices), canvas)
    if not decoded:
        raise VideoError("no_frames", "No frame of the video could be decoded; export it again, as H.264 in an mp4.")
    if decoded <= indices[-1]:
        _check_complete(decoded, frame_count)
    return canvas.frames()


def read_timeline(path: str | Path) -> Timeline | None:
    """Read the timestamps of all packets without decoding; None if they do not identify the frames.

    Raises:
        VideoError: those of `open_video`.
    """
    times: list[int] = []
    keyframes: list[int] = []
    hidden = 0
    with open_video(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                if not packet.size or packet.is_corrupt:
                    continue
                if packet.pts is None:
                    return None
                if packet.is_keyframe:
                    keyframes.append(packet.pts)
                if packet.is_discard:
                    hidden += 1
                else:
                    times.append(packet.pts)
        except av.FFmpegError:
            return None
    times.sort()
    keyframes.sort()
    unique = all(earlier < later for earlier, later in pairwise(times))
    return Timeline(times, keyframes, hidden) if times and unique and keyframes else None


def read_stamps(path: str | Path, info: VideoInfo) -> tuple[float, float]:
    """The first frame's timestamp and how long the frames last, both in seconds. Decodes nothing.

    Raises:
        VideoError: those of `open_video`.
    """
    timeline = read_timeline(path)
    with open_video(path) as (_, stream):
        base = float(stream.time_base or 0)
    if timeline is None or not base:
        return 0.0, info.duration_s
    first, last, count = timeline.times[0], timeline.times[-1], len(timeline.times)
    frame = (last - first) * base / (count - 1) if count > 1 else 1 / info.fps
    return first * base, (last - first) * base + frame


class _Canvas:
    """The frames of a result, in one array from the start, so that a large video is held only once."""

    def __init__(self, count: int, max_bytes: int | None) -> None:
        self._count, self._max_bytes = count, max_bytes
        self._frames_NHW3: np.ndarray | None = None

    def put(self, positions: Sequence[int], frame: av.VideoFrame) -> None:
        """Write a frame to its places; if the stream changes its size, scale the frame to the first one's size."""
        pixels = _upright_rgb(frame)
        if self._frames_NHW3 is None:
            size = self._count * pixels.nbytes
            if self._max_bytes is not None and size > self._max_bytes:
                raise VideoError(
                    "video_too_large_to_decode",
                    f"{self._count} frames of {pixels.shape[1]}x{pixels.shape[0]} pixels are {size / 1e6:.0f} MB, more "
                    f"than the {self._max_bytes / 1e6:.0f} MB a video may decode to: scale it down.",
                )
            self._frames_NHW3 = np.empty((self._count, *pixels.shape), np.uint8)
        height, width = self._frames_NHW3.shape[1:3]
        if pixels.shape[:2] != (height, width):
            whole = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            pixels = whole.reformat(width=width, height=height).to_ndarray()
        for position in positions:
            self._frames_NHW3[position] = pixels

    def frames(self) -> np.ndarray:
        """uint8 [N, H, W, 3]; only valid when every place is filled."""
        assert self._frames_NHW3 is not None
        return self._frames_NHW3


def _positions(keys: Iterable[int]) -> dict[int, list[int]]:
    """Each key -> its places in the result."""
    found: dict[int, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return found


def _decode_by_seeking(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    wanted: Mapping[int, Sequence[int]],
    keyframes: list[int],
    canvas: _Canvas,
) -> bool:
    """Put the frames with these presentation times; False if the decoder's times do not agree with the packets'."""
    stream.thread_type = "AUTO"
    frames: Iterator[av.VideoFrame] = iter(())
    position: int | None = None
    for time in sorted(wanted):
        start = keyframes[max(0, bisect_right(keyframes, time) - 1)]
        if start > time:
            return False
        try:
            if position is None or start > position:
                container.seek(start, stream=stream, backward=True)
                frames = container.decode(stream)
            for frame in frames:
                if frame.pts is None or frame.pts >= time:
                    break
            else:
                return False
        except av.FFmpegError as error:
            _raise_if_memory(error)
            return False
        if frame.pts != time:
            return False
        position = time
        canvas.put(wanted[time], frame)
    return True


def _decode_by_counting(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    wanted: Mapping[int, Sequence[int]],
    canvas: _Canvas,
) -> int:
    """Put the frames with these indices, or the last one if the video ends early; returns how many were decoded."""
    stream.thread_type = "AUTO"
    last, count, end = None, 0, max(wanted)
    try:
        for frame in container.decode(stream):
            if count in wanted:
                canvas.put(wanted[count], frame)
            last, count = frame, count + 1
            if count > end:
                return count
    except av.FFmpegError as error:
        _raise_if_memory(error)
        if not count:
            raise VideoError("no_frames", f"No frame of the video could be decoded ({error.strerror}).") from error
    if last is not None:
        canvas.put([place for index, places in wanted.items() if index >= count for place in places], last)
    return count


def _raise_if_memory(error: av.FFmpegError) -> None:
    """Raise MemoryError if memory ran out: then no frames are missing."""
    if error.errno == errno.ENOMEM:
        raise MemoryError from error


def shown(info: VideoInfo, timeline: Timeline | None) -> VideoInfo:
    """The header with the frames and duration that an edit list leaves."""
    if timeline is None or timeline.hidden <= TOLERATED_MISSING:
        return info
    count = len(timeline.times)
    return replace(info, frame_count=count, duration_s=count / info.fps)


def _check_complete(available: int, claimed: int) -> None:
    if available < claimed - TOLERATED_MISSING or available == 0:
        raise VideoError(
            "truncated_video",
            f"The video is cut short or damaged: it claims {claimed} frames but only {available} are there. "
            "Upload the complete file.",
        )


def _upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    """RGB, after applying the rotation that phones record as metadata."""
    pixels = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns)) if quarter_turns else pixels
