"""Reads what a file claims to be from its header, and checks whether that is acceptable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import av.container
import av.video.stream

from f2l_vllm.video.errors import VideoError

# Demuxers that read nothing but the file itself. Playlists (hls, concat, dash) could name other files or addresses, and
# image readers would take a still picture for a one-frame video. Audio formats are listed so that the error names them.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,mxf,h264,hevc,ivf,mp3,wav,flac,aac"
_MAGIC = (  # (offset, bytes) at the start of the containers that fail to open when cut short
    (4, b"ftyp"),
    (4, b"moov"),
    (4, b"mdat"),
    (0, b"\x1aE\xdf\xa3"),
    (8, b"AVI "),
    (0, b"FLV\x01"),
    (0, b"OggS"),
)
_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_DEFAULT_FPS = 24.0  # what transformers assumes for a video without a rate


@dataclass(frozen=True)
class VideoInfo:
    """Header of the first video stream. Width and height are as stored; rotation is applied when decoding.

    Attributes:
        duration_s: the longest duration that any part of the header claims, in seconds.
        fps: average frames per second.
        frame_count: frames the header claims, or packets counted when it claims none.
    """

    duration_s: float
    fps: float
    frame_count: int
    width: int
    height: int
    codec: str


@dataclass(frozen=True)
class Limits:
    """Which videos are accepted. Sizes in bytes, seconds and pixels; a side is width or height."""

    max_bytes: int = 2 * 1024**3
    max_duration_s: float = 4 * 3600.0
    max_pixels: int = 8192 * 4320
    max_frames: int = 4 * 3600 * 120
    min_side: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Limits.{name} must be positive, got {value!r}.")


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """Open a local file and its first video stream.

    Raises:
        VideoError: empty_file, not_a_video, truncated_video, no_video_stream, unsupported_codec.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise VideoError("empty_file", "The file is empty; upload the video again.")
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path}", mode="r", container_options=options)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _cannot_open(head) from error
    with container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            raise VideoError("no_video_stream", "The file has no video stream (only audio?); upload a video.")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(
                "unsupported_codec", "The video's codec cannot be decoded here; convert it to H.264 in an mp4 file."
            )
        yield container, stream


def probe(path: str | Path) -> VideoInfo:
    """Read the header; decodes nothing.

    Raises:
        VideoError: as `open_video`, and no_frames.
        FileNotFoundError: no such file.
    """
    with open_video(path) as (container, stream):
        claimed = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        duration = max(claimed, (container.duration or 0) / av.time_base, 0.0)
        frame_count = stream.frames or _count_packets(container, stream)
        if frame_count <= 0:
            raise VideoError("no_frames", "The video stream holds no frames; export the video again.")
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        fps = float(rate) if rate else (frame_count / duration if duration else _DEFAULT_FPS)
        context = stream.codec_context
        return VideoInfo(
            duration_s=max(duration, frame_count / fps),
            fps=fps,
            frame_count=frame_count,
            width=context.width,
            height=context.height,
            codec=context.codec.canonical_name,
        )


def check_file(path: str | Path, limits: Limits) -> VideoInfo:
    """Probe a file and refuse one outside the limits.

    Raises:
        VideoError: as `probe`, `check_size` and `check`.
        FileNotFoundError: no such file.
    """
    check_size(Path(path).stat().st_size, limits)
    info = probe(path)
    check(info, limits)
    return info


def check_size(size_bytes: int, limits: Limits) -> None:
    """Refuse a file that is too large before reading any of it.

    Raises:
        VideoError: file_too_large.
    """
    if size_bytes > limits.max_bytes:
        raise VideoError(
            "file_too_large",
            f"The file has {size_bytes / 1e6:.1f} MB, at most {limits.max_bytes / 1e6:.1f} MB are accepted; "
            "compress or cut the video.",
        )


def check(info: VideoInfo, limits: Limits) -> None:
    """Refuse a video outside the limits.

    Raises:
        VideoError: video_too_small, video_too_large, video_too_long.
    """
    size = f"{info.width}x{info.height}"
    if min(info.width, info.height) < limits.min_side:
        raise VideoError(
            "video_too_small", f"The frames are {size} pixels; each side needs at least {limits.min_side} pixels."
        )
    if info.width * info.height > limits.max_pixels:
        raise VideoError(
            "video_too_large",
            f"The frames are {size} pixels, more than the {limits.max_pixels} that are accepted; scale the video down.",
        )
    if info.duration_s > limits.max_duration_s or info.frame_count > limits.max_frames:
        raise VideoError(
            "video_too_long",
            f"The video claims {info.duration_s:.0f} seconds and {info.frame_count} frames; at most "
            f"{limits.max_duration_s:.0f} seconds and {limits.max_frames} frames are accepted. Cut it into parts.",
        )


def _is_cover(stream: av.video.stream.VideoStream) -> bool:
    """True for the picture attached to an audio file."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _cannot_open(head: bytes) -> VideoError:
    if any(head[offset : offset + len(magic)] == magic for offset, magic in _MAGIC):
        return VideoError(
            "truncated_video", "The file starts as a video but is cut short or damaged; upload the complete file."
        )
    kind = "an image" if head.startswith(_IMAGES) or head[8:12] == b"WEBP" else "not a video in a known format"
    return VideoError("not_a_video", f"The file is {kind}; upload an mp4, mov, webm, mkv or avi file.")


def _count_packets(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> int:
    """Number of frames in a container that does not state it: one packet is one shown frame."""
    try:
        return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
    except av.FFmpegError as error:
        raise VideoError("truncated_video", "The video is damaged; upload the complete file.") from error
