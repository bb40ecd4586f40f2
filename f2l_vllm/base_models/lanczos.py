"""Lanczos resizing of uint8 images on any device, with the weights and the rounding of torch's operator for CPUs.

torch has the filter for CPUs alone, and elsewhere transformers takes a bicubic one, which no hypernetwork was trained
with. Here each axis is a matrix product whose rows are the filter's taps. Like torch and Pillow, it computes with
weights of 15 bits and rounds to whole values after each axis. A GPU that multiplies in TF32 or bf16, as a worker's
settings or another library's let it, drops bits of such weights; their upper and lower halves have few enough to keep.

Shape suffixes: N images, C colours, H, W before, h, w after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_LOBES = 3
_WEIGHT_BITS = 15
_VALUES_AT_ONCE = 1 << 24  # in fp32: a batch of large frames would take gigabytes, and one of 8K almost half of one


def resize(images_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 images to (height, width), with antialiasing: uint8 [N, C, h, w], within 1 of the CPU's."""
    height, width = images_NCHW.shape[-2:]
    images = images_NCHW
    if width != size[1]:
        taps_2wW = taps(width, size[1], images.device)
        images = torch.cat([_rounded(_product(part, taps_2wW)) for part in _pieces(images, 2)], 2)
    if height != size[0]:
        taps_2hH = taps(height, size[0], images.device)
        images = torch.cat([_rounded(_product(part.mT, taps_2hH).mT) for part in _pieces(images, 3)], 3)
    return images


@lru_cache(maxsize=16)  # of the last few sizes of videos; computing them takes longer than using them
def taps(before: int, after: int, device: torch.device | str = "cpu") -> Tensor:
    """The weight of every input value in every output value, rows of sum 1 but for rounding: fp32 [2, after, before],
    the upper and the lower eight bits, which add up to it."""
    scale = before / after
    stretch = max(scale, 1.0)
    centres = (torch.arange(after, dtype=torch.float64) + 0.5) * scale
    places = torch.arange(before, dtype=torch.float64) + 0.5
    distances = (places[None, :] - centres[:, None]) / stretch
    weights = torch.where(distances.abs() < _LOBES, torch.sinc(distances) * torch.sinc(distances / _LOBES), 0.0)
    weights /= weights.sum(1, keepdim=True)
    bits = 0  # after the point, so that the largest weight has no more than it may
    while bits < 22 and math.floor(0.5 + weights.max().item() * 2 ** (bits + 1)) < 2**_WEIGHT_BITS:
        bits += 1
    weights = weights.mul_(2**bits).round_()
    upper = (weights / 256).round_().mul_(256)
    return torch.stack([upper, weights - upper]).div_(2**bits).float().to(device)


def _product(values: Tensor, weights: Tensor) -> Tensor:
    """[..., before] with the upper and the lower halves of `taps` -> [..., after]."""
    values = values.float()
    upper, lower = weights
    return (values @ upper.T).add_(values @ lower.T)


def _pieces(images_NCHW: Tensor, axis: int) -> Sequence[Tensor]:
    """Parts of `_VALUES_AT_ONCE` values at most, cut along the axis that is not resized; of one line at least."""
    lines = images_NCHW.shape[axis]
    return images_NCHW.split(max(1, lines * _VALUES_AT_ONCE // max(1, images_NCHW.numel())), axis)


def _rounded(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)
