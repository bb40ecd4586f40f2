"""Real video files for tests, made with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def picture(index: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A frame that tells its index: a bright bar that moves, on a colour that drifts. uint8 [H, W, 3]."""
    row = np.zeros((width, 3), dtype=np.uint8)
    row[:, 0] = (index * 7) % 256
    row[:, 2] = np.linspace(0, 200, width, dtype=np.uint8)
    start = (index * 3) % width
    row[start : start + 6] = 255
    return np.repeat(row[None], height, axis=0)


def write_video(
    path: Path,
    frames: int = 30,
    fps: int = 10,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: list[int] | None = None,
) -> Path:
    """Write `frames` pictures of `size` (width, height); `times` are milliseconds for a variable frame rate."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.options = options or {}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path, seconds: float = 1.0) -> Path:
    """Write an mp4 with one aac stream and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = (np.sin(np.arange(int(16000 * seconds)) / 20) * 0.3).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def rotate_clockwise(path: Path) -> Path:
    """Set the display matrix of an mp4 to a quarter turn clockwise, as a phone held upright does."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    matrix = (0, 0x00010000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000)
    data[start : start + 36] = b"".join(value.to_bytes(4, "big") for value in matrix)
    path.write_bytes(data)
    return path


def hide_first_second(path: Path) -> Path:
    """Make the edit list of an mp4 start one second later, as trimming without encoding again does."""
    data = path.read_bytes()
    scale = int.from_bytes(data[data.index(b"mdhd") + 16 :][:4], "big")
    start = int.from_bytes(data[data.index(b"elst") + 16 :][:4], "big")
    return patch_header(path, b"elst", 12, (start + scale).to_bytes(4, "big"))


def patch_header(path: Path, box: bytes, offset: int, value: bytes) -> Path:
    """Overwrite bytes `offset` after the name of the first mp4 box of that name."""
    data = bytearray(path.read_bytes())
    start = data.index(box) + 4 + offset
    data[start : start + len(value)] = value
    path.write_bytes(data)
    return path
