"""Small pictures of videos: a poster, and a strip of the frames that the model read.

They are decoded in a separate process, like everything from outside, and kept in this process's memory alone, so that
nothing of a deleted video stays on a disk.
"""

from __future__ import annotations

import asyncio
import functools
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from f2l_vllm.server.media.turns import Turns
from f2l_vllm.settings import Settings
from f2l_vllm.video.decoder import DecodeLimits, Decoders
from f2l_vllm.video.errors import VideoError

POSTER, STRIP = "poster", "strip"
STRIP_FRAMES = 12
_POSTER_HEIGHT, _STRIP_HEIGHT = 180, 96
_GAP = 3  # pixels between two frames
_WIDEST = 2.4  # widths per height; wider frames are cut at both sides
_POSTER_AT = 0.25  # of the video: its first frames are often black
_SECONDS = 30.0
_NICE = 10  # decoding gives way to answering
_KEPT_BYTES = 64 << 20
_QUALITY = 80


@dataclass(frozen=True)
class Preview:
    """A picture in WebP, and the seconds into the video of the frames side by side in it."""

    picture: bytes
    seconds: tuple[float, ...]


class Previews:
    """Makes previews, one at a time, and keeps those used last. Lives on the API server's event loop."""

    def __init__(self, settings: Settings) -> None:
        seconds = min(_SECONDS, settings.decode_seconds)
        limits = DecodeLimits(settings.decode_memory_bytes, seconds, settings.max_decoded_bytes, _NICE)
        self._limits = settings.kept_video_limits
        self._decoders = Decoders(1, limits)
        self._turns = Turns(1)
        self._thread = ThreadPoolExecutor(1, "f2l-previews")
        self._kept: OrderedDict[tuple[str, str], Preview | VideoError] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def kept(self, video: str, kind: str) -> Preview | None:
        """The preview, if it was made before.

        Raises:
            VideoError: making it has failed before.
        """
        with self._lock:
            found = self._kept.get((video, kind))
            if found is not None:
                self._kept.move_to_end((video, kind))
        if isinstance(found, VideoError):
            raise _again(found)
        return found

    async def make(self, video: str, kind: str, path: Path, timestamps: Sequence[float], tenant: str) -> Preview:
        """Decode and keep a preview; tenants take turns.

        Args:
            video: the name under which it is kept.
            path: the video's bytes.
            timestamps: seconds into the video of the frames to show; empty: one frame, chosen here.

        Raises:
            VideoError: the video cannot be decoded.
            FileNotFoundError: the bytes have gone.
        """
        await self._turns.take(tenant)
        try:
            if (known := self.kept(video, kind)) is not None:
                return known  # made while this one waited
            work = asyncio.get_running_loop().run_in_executor(self._thread, partial(self._make, path, timestamps))
            made: Preview | VideoError
            try:
                made = await asyncio.shield(work)  # a thread cannot be cancelled
            except VideoError as error:
                self._keep(video, kind, _again(error))
                raise
            self._keep(video, kind, made)
            return made
        finally:
            self._turns.give_back()

    def names(self) -> list[str]:
        """The videos of which previews are kept. Any thread may call it."""
        with self._lock:
            return [video for video, _ in self._kept]

    def forget(self, video: str) -> None:
        """Drop all previews of a video that was deleted. Any thread may call it."""
        with self._lock:
            for kind in (POSTER, STRIP):
                self._bytes -= _size(self._kept.pop((video, kind), None))

    def _keep(self, video: str, kind: str, made: Preview | VideoError) -> None:
        with self._lock:
            self._bytes += _size(made) - _size(self._kept.pop((video, kind), None))
            self._kept[video, kind] = made
            while self._bytes > _KEPT_BYTES:
                self._bytes -= _size(self._kept.popitem(last=False)[1])

    def _make(self, path: Path, timestamps: Sequence[float]) -> Preview:
        height = _STRIP_HEIGHT if timestamps else _POSTER_HEIGHT
        with self._decoders.lend() as decoder:
            info = decoder.open(path, self._limits)
            seconds = _chosen(timestamps) or (_POSTER_AT * info.frame_count / info.fps,)
            indices = [min(round(second * info.fps), info.frame_count - 1) for second in seconds]
            frames = decoder.frames(path, indices, info.frame_count, functools.partial(_scaled, height=height))
        return Preview(_side_by_side(frames), seconds)


def _chosen(timestamps: Sequence[float]) -> tuple[float, ...]:
    """At most `STRIP_FRAMES` of them, evenly, the first and the last among them."""
    last = len(timestamps) - 1
    if last < STRIP_FRAMES:
        return tuple(timestamps)
    return tuple(timestamps[round(place * last / (STRIP_FRAMES - 1))] for place in range(STRIP_FRAMES))


def _scaled(frames: np.ndarray, height: int) -> np.ndarray:
    """[1, H, W, 3] to [1, height, w, 3]."""
    image = Image.fromarray(frames[0])
    width = max(1, min(round(image.width * height / image.height), int(_WIDEST * height)))
    kept = min(image.width, max(1, round(image.height * width / height)))
    left = (image.width - kept) // 2
    box = (left, 0, left + kept, image.height)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box, reducing_gap=2.0))[None]


def _side_by_side(frames: np.ndarray) -> bytes:
    """[N, height, w, 3] as one WebP, with transparent gaps between the frames."""
    count, height, width, _ = frames.shape
    whole = Image.new("RGBA", (count * (width + _GAP) - _GAP, height))
    for place, frame in enumerate(frames):
        whole.paste(Image.fromarray(frame), (place * (width + _GAP), 0))
    picture = io.BytesIO()
    whole.save(picture, "WEBP", quality=_QUALITY, method=4)
    return picture.getvalue()


def _again(error: VideoError) -> VideoError:
    """The same without its traceback, which holds what was at work and grows each time that an error is raised."""
    return VideoError(error.code, error.message)


def _size(made: Preview | VideoError | None) -> int:
    """The bytes that keeping it takes, roughly: a key, a record and the picture."""
    return 0 if made is None else 512 + (len(made.picture) if isinstance(made, Preview) else 0)
