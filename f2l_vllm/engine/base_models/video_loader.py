"""A video loader for vLLM that decodes like internalization, so that both read the very same frames.

vLLM picks this loader for every model whose video processor was given to `decode_videos_of`; no setting is needed.
`--media-io-kwargs '{"video": {"max_frames": 32, "fps": 1}}'` overrides the sampling of the model's own configuration.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from f2l_vllm.settings import current
from f2l_vllm.video.decoder import Decoders, IsolatedDecoder, Shrink
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import Limits, VideoInfo
from f2l_vllm.video.sample import Sampling, sample_video

NAME = "f2l"
WHOLE_BYTES = 64 << 20  # limit of a video's frames that are held in their decoded size


class SampledVideoLoader(VideoLoader):
    """Frames that the served model's own sampler chooses.

    The sampler is the model's processor, which vLLM does not pass to loaders. The model's multi-modal processor, which
    exists in the API server before any request, sets it here with `use_processor`.
    """

    _processor: ClassVar[Callable[[], Any] | None] = None
    _resize: ClassVar[Shrink | None] = None

    @classmethod
    def use_processor(cls, get_processor: Callable[[], Any], resize: Shrink) -> None:
        """Sample like the processor that `get_processor` returns, and resize frames like it with `resize`. The last
        call in a process counts."""
        cls._processor, cls._resize = get_processor, resize

    @classmethod
    def load_bytes(
        cls, data: bytes, *, max_frames: int | None = None, fps: float | None = None, **kwargs: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Decode a video file.

        Args:
            data: the file's bytes.
            max_frames: at most this many frames; the model's own number when None.
            fps: frames per second of video; the model's own rate when None.
            kwargs: what vLLM passes to every loader, such as `num_frames`; unused, as its default is not the model's.

        Returns:
            uint8 frames `[N, H, W, 3]` and the fields of transformers' VideoMetadata; also `resized`, true if frames
            were too large to be held in their own size and have been resized one by one.

        Raises:
            ValueError: the video cannot be used, or the served model takes no video; the message says what to do.
        """
        with tempfile.NamedTemporaryFile(prefix="f2l-video-") as file:
            file.write(data)
            file.flush()
            return cls._load(Path(file.name), current().video_limits, max_frames, fps)

    @classmethod
    def load_path(
        cls, path: Path, *, max_frames: int | None = None, fps: float | None = None, **kwargs: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As `load_bytes`, but reads a file of the store in place. Also raises FileNotFoundError."""
        return cls._load(path, current().kept_video_limits, max_frames, fps)

    @classmethod
    def _load(
        cls, path: Path, limits: Limits, max_frames: int | None, fps: float | None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if cls._processor is None:
            raise ValueError("This server's model does not take videos: serve one that does.")
        sampling = Sampling(max_frames=max_frames, fps=fps)
        try:
            with _decoders().lend() as isolated:
                decoder = _Shrinking(isolated, cls._resize)
                video = sample_video(path, cls._processor(), limits, sampling, decoder)
        except VideoError as error:
            raise ValueError(error.message) from error
        metadata = dict(video.metadata)
        metadata["frames_indices"] = [int(index) for index in video.metadata.frames_indices]
        return video.frames, {**metadata, "do_sample_frames": False, "resized": decoder.has_resized}


def decode_videos_of(video_processors: tuple[str, ...]) -> None:
    """Make vLLM use this loader for the models with one of these processors."""
    VIDEO_LOADER_REGISTRY.register(NAME, video_processor=video_processors)(SampledVideoLoader)


class _Shrinking:
    """A decoder that resizes frames one by one if together they are larger than `WHOLE_BYTES`."""

    def __init__(self, decoder: IsolatedDecoder, resize: Shrink | None) -> None:
        self._decoder = decoder
        self._resize = resize
        self.has_resized = False

    def open(self, path: str | Path, limits: Limits) -> VideoInfo:
        return self._decoder.open(path, limits)

    def frames(self, path: str | Path, indices: Sequence[int], frame_count: int) -> np.ndarray:
        def shrink(frame: np.ndarray) -> np.ndarray:
            if self._resize is None or frame.nbytes * len(indices) <= WHOLE_BYTES:
                return frame
            self.has_resized = True
            return self._resize(frame)

        return self._decoder.frames(path, indices, frame_count, shrink)


@cache
def _decoders() -> Decoders:
    return Decoders(2, replace(current().decode_limits, nice=10))  # gives way to answering
