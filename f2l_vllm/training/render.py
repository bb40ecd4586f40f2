"""Scenes as pixels: real mp4 files, and the tensors SmolVLM's processor would make of them.

Both draw the same signed-distance shapes. For training, a scene is drawn at twice the size the processor first
shrinks a frame to, and the processor's own resampling, which is linear, is applied as two small matrices; so a batch
costs milliseconds and agrees with writing, decoding and processing a file.

Shape suffixes: B scenes, K shapes of a scene, T frames, H and W pixels, Y and X pixels of the model's square image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor, get_resize_output_image_size
from transformers.video_utils import VideoMetadata

from f2l_vllm.training.checkpoint import IMAGE_SIZE
from f2l_vllm.training.world import BACKGROUNDS, COLOURS, SHAPES, MovingShape, Scene

_OVERSAMPLING = 2
MAX_SHAPES = 2


def write_mp4(
    scene: Scene, path: str | Path, size: tuple[int, int] = (320, 240), fps: float = 10, seconds: float = 8.0
) -> Path:
    """Write a scene as an H.264 file.

    Args:
        size: (width, height) in pixels, both even.
        fps: frames per second; `seconds * fps` frames are written, at least one.

    Raises:
        ValueError: for an odd width or height, which H.264's chroma planes cannot hold.
    """
    width, height = size
    if width % 2 or height % 2:
        raise ValueError(f"an mp4's width and height must be even, not {width} x {height}")
    total = max(1, round(seconds * fps))
    times_T = (torch.arange(total) + 0.5) / total
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_rate(fps), options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        for start in range(0, total, 16):
            for image_HWC in draw(scene, times_T[start : start + 16], height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image_HWC, format="rgb24")))
        container.mux(stream.encode())
    return Path(path)


def _rate(fps: float) -> Any:
    from fractions import Fraction

    return Fraction(fps).limit_denominator(1001)


def read_mp4(path: str | Path) -> tuple[np.ndarray, VideoMetadata]:
    """Every frame of a file, uint8 [T, H, W, 3], and the metadata from which SmolVLM's processor samples."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        fps = float(stream.average_rate or 1)
    video = np.stack(frames)
    total, height, width, _ = video.shape
    return video, VideoMetadata(
        total_num_frames=total, fps=fps, duration=total / fps, width=width, height=height, video_backend="pyav"
    )


def draw(scene: Scene, times_T: Tensor, height: int, width: int) -> np.ndarray:
    """Frames of a scene at the given times in [0, 1], uint8 RGB [T, height, width, 3]."""
    masks_KTHW = coverage([scene], times_T[None], height, width)[0]
    image_TCHW = _blend(masks_KTHW[None], _colours([scene]), _backgrounds([scene]))[0]
    return image_TCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def pixel_values(
    scenes: Sequence[Scene],
    times_BT: Tensor,
    size: tuple[int, int],
    processor: SmolVLMVideoProcessor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What the processor gives for these scenes filmed at `size` (width, height): [B, T, 3, Y, X] in [-1, 1].

    Args:
        times_BT: the sampled frames' times in [0, 1].
        generator: when given, colours, brightness and pixels vary a little, as codecs and cameras make them.
    """
    width, height = size
    inner_height, inner_width = get_resize_output_image_size(torch.empty(1, height, width), IMAGE_SIZE)
    rows_YH, columns_XW = _resampling(inner_height, inner_width, processor)
    masks_BKTHW = coverage(scenes, times_BT, inner_height * _OVERSAMPLING, inner_width * _OVERSAMPLING)
    masks_BKTYX = rows_YH @ (masks_BKTHW @ columns_XW.T)
    colours_BKC, backgrounds_BC = _colours(scenes), _backgrounds(scenes)
    if generator is not None:
        colours_BKC = colours_BKC + torch.randn(colours_BKC.shape, generator=generator) * 8
        backgrounds_BC = backgrounds_BC + torch.randn(backgrounds_BC.shape, generator=generator) * 5
    image_BTCYX = _blend(masks_BKTYX, colours_BKC, backgrounds_BC)
    if generator is not None:
        gain_B = 1 + torch.randn(len(scenes), generator=generator) * 0.03
        image_BTCYX = image_BTCYX * gain_B[:, None, None, None, None]
        image_BTCYX = image_BTCYX + torch.randn(image_BTCYX.shape, generator=generator) * 2.5
    return image_BTCYX.clamp(0, 255) / 127.5 - 1


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


def _blend(masks_BKTHW: Tensor, colours_BKC: Tensor, backgrounds_BC: Tensor) -> Tensor:
    offsets_BKC = colours_BKC - backgrounds_BC[:, None]
    image_BTCHW = torch.einsum("bkthw,bkc->btchw", masks_BKTHW, offsets_BKC)
    return image_BTCHW + backgrounds_BC[:, None, :, None, None]


def _colours(scenes: Sequence[Scene]) -> Tensor:
    nothing = (0, 0, 0)
    return torch.tensor(
        [[COLOURS[s.shapes[k].colour] if k < len(s.shapes) else nothing for k in range(MAX_SHAPES)] for s in scenes],
        dtype=torch.float32,
    )


def _backgrounds(scenes: Sequence[Scene]) -> Tensor:
    return torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)


_matrices: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _resampling(height: int, width: int, processor: SmolVLMVideoProcessor) -> tuple[Tensor, Tensor]:
    """The processor's two resizes as matrices over rows [Y, H] and columns [X, W] of an oversampled drawing.

    Read off by resizing the unit vectors: whatever filter the installed torchvision offers is the one used.
    """
    if (height, width) not in _matrices:
        tall, wide = height * _OVERSAMPLING, width * _OVERSAMPLING

        def resize(images: Tensor) -> Tensor:
            lanczos = PILImageResampling.LANCZOS
            return processor.resize(images, SizeDict(longest_edge=IMAGE_SIZE), resample=lanczos)

        rows_HYX = resize(torch.eye(tall)[:, None, :, None].expand(tall, 1, tall, wide).contiguous())[:, 0]
        columns_WYX = resize(torch.eye(wide)[:, None, None, :].expand(wide, 1, tall, wide).contiguous())[:, 0]
        _matrices[height, width] = rows_HYX[:, :, 0].T.contiguous(), columns_WYX[:, 0, :].T.contiguous()
    return _matrices[height, width]
