"""Lanczos resizing of uint8 images on any device, with the weights and the rounding of torch's operator for CPUs.

torch has the filter for CPUs alone, and elsewhere transformers takes a bicubic one, which no hypernetwork was trained
with. Here each axis is one matrix product whose rows are the filter's taps. Like torch and Pillow, it computes with
weights of 15 bits and rounds to whole values after each axis.

Shape suffixes: N images, C colours, H, W before, h, w after.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

_LOBES = 3
_WEIGHT_BITS = 15


def resize(images_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 images to (height, width), with antialiasing: uint8 [N, C, h, w], within 1 of the CPU's."""
    height, width = images_NCHW.shape[-2:]
    values = images_NCHW
    with _all_bits_of_fp32():
        if width != size[1]:
            values = _rounded(values.float() @ taps(width, size[1], values.device).T)
        if height != size[0]:
            values = _rounded(taps(height, size[0], values.device) @ values.float())
    return values.to(torch.uint8)


@lru_cache(maxsize=16)  # of the last few sizes of videos; computing them takes longer than using them
def taps(before: int, after: int, device: torch.device | str = "cpu") -> Tensor:
    """The weight of every input value in every output value: fp32 [after, before], rows of sum 1 but for rounding."""
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
    return (weights.mul_(2**bits).round_().div_(2**bits)).float().to(device)


def _rounded(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


@contextmanager
def _all_bits_of_fp32() -> Iterator[None]:
    """A worker's own products may leave out bits (TF32), of which the weights have too many."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = before
