"""Selected frames of a video, decoding as little as possible.

An index counts frames in presentation order, as a decoder puts them out. The packets' timestamps say which one that is
and from which keyframe to decode; where they do not, everything up to the last index is decoded and counted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import av.container
import av.video.stream
import numpy as np

from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import open_video

TOLERATED_MISSING = 4  # headers also count frames that an edit list hides or a decoder keeps back at the very end


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown.

    Attributes:
        times: presentation time of every shown frame, ascending, in the stream's time base.
        keyframes: presentation times that decoding can start from, ascending.
        hidden: frames that are in the file but that an edit list leaves out.
    """

    times: list[int]
    keyframes: list[int]
    hidden: int


def decode_frames(
    path: str | Path, indices: Sequence[int], frame_count: int, timeline: Timeline | None = None
) -> np.ndarray:
    """Decode the frames at ascending `indices` of a video that claims to show `frame_count` frames.

    A frame missing at the very end (at most `TOLERATED_MISSING`) is replaced by the last one there is.

    Args:
        timeline: from `read_timeline`; without it everything up to the last index is decoded.

    Returns:
        uint8 [len(indices), H, W, 3], upright RGB.

    Raises:
        VideoError: truncated_video, no_frames, and those of `open_video`.
    """
    assert list(indices) == sorted(indices), indices
    assert len(indices) > 0, "no frame was asked for"
    if timeline is not None:
        _check_complete(len(timeline.times), frame_count)
        wanted = [timeline.times[min(index, len(timeline.times) - 1)] for index in indices]
        with open_video(path) as (container, stream):
            by_time = _decode_by_seeking(container, stream, wanted, timeline.keyframes)
        if by_time is not None:
            return _stack([by_time[time] for time in wanted])
    with open_video(path) as (container, stream):
        by_index, decoded = _decode_by_counting(container, stream, set(indices))
    if not decoded:
        raise VideoError("no_frames", "No frame of the video could be decoded; export it again, as H.264 in an mp4.")
    if decoded <= indices[-1]:
        _check_complete(decoded, frame_count)
    return _stack([by_index[min(index, decoded - 1)] for index in indices])


def read_timeline(path: str | Path) -> Timeline | None:
    """Read the timestamps of all packets without decoding; None where they do not identify the frames.

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


def _decode_by_seeking(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    wanted: list[int],
    keyframes: list[int],
) -> dict[int, np.ndarray] | None:
    """Frames by presentation time, or None when the decoder's times do not agree with the packets'."""
    stream.thread_type = "AUTO"
    found: dict[int, np.ndarray] = {}
    frames: Iterator[av.VideoFrame] = iter(())
    position: int | None = None
    for time in sorted(set(wanted)):
        start = keyframes[max(0, bisect_right(keyframes, time) - 1)]
        if start > time:
            return None
        try:
            if position is None or start > position:
                container.seek(start, stream=stream, backward=True)
                frames = container.decode(stream)
            for frame in frames:
                if frame.pts is None or frame.pts >= time:
                    break
            else:
                return None
        except av.FFmpegError:
            return None
        if frame.pts != time:
            return None
        position = time
        found[time] = _upright_rgb(frame)
    return found


def _decode_by_counting(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, wanted: set[int]
) -> tuple[dict[int, np.ndarray], int]:
    """Wanted frames by index, and how many could be decoded; the last frame is kept too if the video ends early."""
    stream.thread_type = "AUTO"
    found: dict[int, np.ndarray] = {}
    last, count, end = None, 0, max(wanted)
    try:
        for frame in container.decode(stream):
            if count in wanted:
                found[count] = _upright_rgb(frame)
            last, count = frame, count + 1
            if count > end:
                return found, count
    except av.FFmpegError as error:
        if not count:
            raise VideoError("no_frames", f"No frame of the video could be decoded ({error.strerror}).") from error
    if last is not None:
        found[count - 1] = _upright_rgb(last)
    return found, count


def _check_complete(available: int, claimed: int) -> None:
    if available < claimed - TOLERATED_MISSING or available == 0:
        raise VideoError(
            "truncated_video",
            f"The video is cut short or damaged: it claims {claimed} frames but only {available} are there. "
            "Upload the complete file.",
        )


def _upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    """RGB with the rotation that phones record as metadata applied."""
    pixels = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns)) if quarter_turns else pixels


def _stack(frames: list[np.ndarray]) -> np.ndarray:
    """One array; where a stream changes its size on the way, every frame is scaled to the size of the first."""
    if any(frame.shape != frames[0].shape for frame in frames):
        height, width = frames[0].shape[:2]
        frames = [
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            .reformat(width=width, height=height)
            .to_ndarray()
            for frame in frames
        ]
    return np.stack(frames)
