"""How a video is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadingOptions:
    """How a video is read before an adapter is made of it; None: as the hypernetwork was trained, in one pass.

    Attributes:
        max_frames: at most this many frames of a video or chunk.
        fps: frames per second of video, until `max_frames` is reached.
        chunk_seconds: cut the video into chunks of this length.
        chunk_frames: cut it into chunks of this many frames.
        max_chunks: a video of more chunks is refused.
        merge_rate: part of the visual tokens that is merged away, in [0, 1).

    Raises:
        ValueError: both ways to cut.
    """

    max_frames: int | None = None
    fps: float | None = None
    chunk_seconds: float | None = None
    chunk_frames: int | None = None
    max_chunks: int = 1
    merge_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.chunk_seconds is not None and self.chunk_frames is not None:
            raise ValueError("videos are cut by seconds or by frames: set one of chunk_seconds and chunk_frames")

    @property
    def is_chunked(self) -> bool:
        """Whether videos are cut into chunks."""
        return self.chunk_seconds is not None or self.chunk_frames is not None

    @property
    def named(self) -> dict[str, float]:
        """The options that shape an adapter and are part of its name: those that are set."""
        return {name: value for name, value in vars(self).items() if value and name != "max_chunks"}
