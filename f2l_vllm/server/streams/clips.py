"""Makes a coarser clip of finer ones: their frames, fewer of each, in one small mp4. It is read as any video is.

The frames come from the isolated decoder; what is encoded here are pictures and nothing of the file that they were in.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from f2l_vllm.video.decoder import IsolatedDecoder
from f2l_vllm.video.probe import Limits

FRAMES = 64  # of a coarser piece: no model here reads more of a video by default
_LONGEST_EDGE = 512  # pixels: no model here looks closer
_TIME_BASE = Fraction(1, 1000)


def write_clip(
    parts: Sequence[tuple[Path, float, float]],
    target: Path,
    decoder: IsolatedDecoder,
    limits: Limits,
    total: int = FRAMES,
) -> None:
    """Write a clip of these parts, in their order. Runs in a thread.

    Args:
        parts: each a video file, with the seconds into the clip where it starts and ends. Between parts, time passes.
        target: an H.264 mp4 whose frames are shown when they were seen.
        total: about so many frames are taken, at even distances.

    Raises:
        VideoError: a part cannot be decoded.
        FileNotFoundError: a part is gone.
    """
    seconds = sum(end - start for _, start, end in parts)
    # The muxer counts in 32 bits from frame to frame: in its own finer units, days between two frames are too many.
    options = {"video_track_timescale": str(_TIME_BASE.denominator)}
    with av.open(str(target), "w", format="mp4", container_options=options) as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "20", "preset": "veryfast", "g": "16"})
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        stream.time_base = stream.codec_context.time_base = _TIME_BASE
        size: tuple[int, int] | None = None
        shown = -1
        for path, start, end in parts:
            count = max(1, round(total * (end - start) / seconds))
            for place, pixels in enumerate(frames := _frames(path, count, decoder, limits)):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if size is None:
                    size = stream.width, stream.height = frame.width - frame.width % 2, frame.height - frame.height % 2
                frame = frame.reformat(width=size[0], height=size[1], format="yuv420p")
                moment = start + (end - start) * place / len(frames)
                shown = max(shown + 1, round(moment * 1000))
                frame.pts, frame.time_base = shown, _TIME_BASE
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.set_chapters(
            [
                {
                    "id": place,
                    "start": round(start * 1000),
                    "end": round(end * 1000),
                    "time_base": _TIME_BASE,
                    "metadata": {},
                }
                for place, (_, start, end) in enumerate(parts)
            ]
        )


def _frames(path: Path, count: int, decoder: IsolatedDecoder, limits: Limits) -> np.ndarray:
    """Frames at even distances: uint8 [N, H, W, 3], no larger than `_LONGEST_EDGE`."""
    info = decoder.open(path, limits)
    indices = [int((place + 0.5) * info.frame_count / count) for place in range(count)]
    known = sorted({min(index, info.frame_count - 1) for index in indices})
    return decoder.frames(path, known, info.frame_count, _shrunk)


def _shrunk(frames: np.ndarray) -> np.ndarray:
    height, width = frames.shape[1:3]
    scale = _LONGEST_EDGE / max(height, width)
    if scale >= 1:
        return frames
    smaller = max(2, round(width * scale)), max(2, round(height * scale))
    whole = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[0]), format="rgb24")
    return whole.reformat(width=smaller[0], height=smaller[1], interpolation="AREA").to_ndarray()[None]
