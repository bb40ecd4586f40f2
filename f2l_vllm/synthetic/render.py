"""Scenes as pixels: real mp4 files of any size and rate, and the signed-distance shapes that they are drawn from.

Shape suffixes: B scenes, K shapes of a scene, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from f2l_vllm.synthetic.world import BACKGROUNDS, COLOURS, SHAPES, MovingShape, Scene

MAX_SHAPES = 2
# (width, height) as cameras, phones and screens make them
FRAME_SIZES = ((320, 240), (640, 360), (240, 240), (270, 480), (240, 320))


def write_mp4(
    scene: Scene, path: str | Path, size: tuple[int, int] = (320, 240), fps: float = 10, seconds: float = 8.0
) -> Path:
    """Write a scene as an H.264 file.

    Args, raises: as `write_film`, of one scene.
    """
    return write_film([scene], path, size, fps, seconds)


def write_film(
    scenes: Sequence[Scene], path: str | Path, size: tuple[int, int], fps: float, seconds_each: float
) -> Path:
    """Write scenes that follow each other as an H.264 file.

    Args:
        size: (width, height) in pixels, both even.
        fps: frames per second; of each scene `seconds_each * fps` frames are written, at least one.

    Raises:
        ValueError: for an odd width or height, which H.264's chroma planes cannot hold.
    """
    width, height = size
    if width % 2 or height % 2:
        raise ValueError(f"an mp4's width and height must be even, not {width} x {height}")
    total = max(1, round(seconds_each * fps))
    times_T = (torch.arange(total) + 0.5) / total
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_rate(fps), options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        for scene in scenes:
            for start in range(0, total, 4):  # more at a time, and every tensor is memory for the system to clear first
                for image_HWC in draw(scene, times_T[start : start + 4], height, width):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image_HWC, format="rgb24")))
        container.mux(stream.encode())
    return Path(path)


def _rate(fps: float) -> Any:
    from fractions import Fraction

    return Fraction(fps).limit_denominator(1001)


def fit(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """(width, height) scaled so that the longer one is `edge`, rounded to the even numbers that H.264 needs."""
    width, height = (max(2, 2 * round(side * edge / max(size) / 2)) for side in size)
    return width, height


def draw(scene: Scene, times_T: Tensor, height: int, width: int) -> np.ndarray:
    """Frames of a scene at the given times in [0, 1], uint8 RGB [T, height, width, 3]."""
    masks_KTHW = coverage([scene], times_T[None], height, width)[0]
    image_TCHW = blend(masks_KTHW[None], colours([scene]), backgrounds([scene]))[0]
    return image_TCHW.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def coverage(scenes: Sequence[Scene], times_BT: Tensor, height: int, width: int) -> Tensor:
    """How much of each pixel each shape covers, hidden parts excluded: [B, K, T, H, W] in [0, 1].

    The second shape lies above the first.
    """
    frames = times_BT.shape[1]
    masks_BKTHW = torch.zeros(len(scenes), MAX_SHAPES, frames, height, width)
    scale = (height * width) ** 0.5
    x_W = (torch.arange(width) + 0.5) / width
    y_H = (torch.arange(height) + 0.5) / height
    for name in SHAPES:
        where = [(b, k) for b, scene in enumerate(scenes) for k, s in enumerate(scene.shapes) if s.shape == name]
        if not where:
            continue
        rows, slots = (torch.tensor(index) for index in zip(*where, strict=True))
        centre_NT2, radius_NT, visible_NT = motion([scenes[b].shapes[k] for b, k in where], times_BT[rows])
        dx_NT1W = ((x_W - centre_NT2[..., :1]) * (width / scale))[:, :, None, :]
        dy_NTH1 = ((y_H - centre_NT2[..., 1:]) * (height / scale))[:, :, :, None]
        distance_NTHW = _distance(name, dx_NT1W, dy_NTH1, radius_NT[..., None, None])
        mask_NTHW = (0.5 - distance_NTHW * scale).clamp_(0, 1)
        masks_BKTHW[rows, slots] = mask_NTHW * visible_NT[..., None, None]
    masks_BKTHW[:, 0] *= 1 - masks_BKTHW[:, 1]
    return masks_BKTHW


def motion(shapes: Sequence[MovingShape], times_NT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the shapes are at each time: centres [N, T, 2], radii [N, T], visibility [N, T] in {0, 1}."""
    ends_N6 = torch.tensor([(*s.start, *s.end, s.radius_start, s.radius_end) for s in shapes])
    time_NT1 = times_NT[..., None]
    centre_NT2 = ends_N6[:, None, 0:2] + (ends_N6[:, None, 2:4] - ends_N6[:, None, 0:2]) * time_NT1
    radius_NT = ends_N6[:, 4:5] + (ends_N6[:, 5:6] - ends_N6[:, 4:5]) * times_NT
    visible_NT = torch.tensor(
        [[shape.visible(time) for time in times] for shape, times in zip(shapes, times_NT.tolist(), strict=True)]
    )
    return centre_NT2, radius_NT, visible_NT.float()


def _distance(shape: str, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """Signed distance to the shape's edge, negative inside; shapes of one radius have about the same area."""
    if shape == "circle":
        return (dx * dx + dy * dy).sqrt() - r
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.86 * r
    if shape == "triangle":
        return torch.maximum(dy - 0.65 * r, 0.86 * dx.abs() - 0.51 * dy - 0.51 * r)
    upright = torch.maximum(dx.abs() - 0.34 * r, dy.abs() - 1.05 * r)
    lying = torch.maximum(dx.abs() - 1.05 * r, dy.abs() - 0.34 * r)
    return torch.minimum(upright, lying)


def blend(masks_BKTHW: Tensor, colours_BKC: Tensor, backgrounds_BC: Tensor) -> Tensor:
    """The image [B, T, C, H, W], 0 to 255, of the masks that `coverage` returns, in these colours."""
    offsets_BKC = colours_BKC - backgrounds_BC[:, None]
    image_BTCHW = torch.einsum("bkthw,bkc->btchw", masks_BKTHW, offsets_BKC)
    return image_BTCHW + backgrounds_BC[:, None, :, None, None]


def colours(scenes: Sequence[Scene]) -> Tensor:
    """RGB of the scenes' shapes, [B, K, 3], 0 to 255."""
    nothing = (0, 0, 0)
    return torch.tensor(
        [[COLOURS[s.shapes[k].colour] if k < len(s.shapes) else nothing for k in range(MAX_SHAPES)] for s in scenes],
        dtype=torch.float32,
    )


def backgrounds(scenes: Sequence[Scene]) -> Tensor:
    """RGB of the scenes' backgrounds, [B, 3], 0 to 255."""
    return torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)
