"""Batches of filmed scenes, as the tensors that SmolVLM's processor would make from video files of them.

A scene is drawn at twice the size to which the processor first shrinks a frame. The processor's resampling is linear
and is applied as two small matrices. A batch therefore costs milliseconds and agrees with writing, decoding and
processing a file.

Shape suffixes: B scenes, K shapes of a scene, T frames, H and W pixels, Y and X pixels of the model's square image.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor, get_resize_output_image_size

from f2l_vllm.recipes.f2l_tiny.checkpoint import IMAGE_SIZE
from f2l_vllm.synthetic.render import FRAME_SIZES, backgrounds, blend, colours, coverage
from f2l_vllm.synthetic.world import Scene
from f2l_vllm.train.steps import Randomness

_OVERSAMPLING = 2
_SIZE_WEIGHTS = (4, 3, 2, 1, 1)


def draw_size(rng: random.Random) -> tuple[int, int]:
    return rng.choices(FRAME_SIZES, _SIZE_WEIGHTS)[0]


def film(
    scenes: Sequence[Scene],
    times_BT: Tensor,
    size: tuple[int, int],
    processor: SmolVLMVideoProcessor,
    randomness: Randomness,
) -> Tensor:
    """Pixel values [B, T, 3, Y, X] with the small variations of real footage."""
    return pixel_values(scenes, times_BT, size, processor, randomness.torch_rng)


def pixel_values(
    scenes: Sequence[Scene],
    times_BT: Tensor,
    size: tuple[int, int],
    processor: SmolVLMVideoProcessor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The processor's output for these scenes filmed at `size` (width, height): [B, T, 3, Y, X] in [-1, 1].

    Args:
        times_BT: the sampled frames' times in [0, 1].
        generator: when given, colours, brightness and pixels vary a little, as with codecs and cameras.
    """
    width, height = size
    inner_height, inner_width = get_resize_output_image_size(torch.empty(1, height, width), IMAGE_SIZE)
    rows_YH, columns_XW = _resampling(inner_height, inner_width, processor)
    masks_BKTHW = coverage(scenes, times_BT, inner_height * _OVERSAMPLING, inner_width * _OVERSAMPLING)
    masks_BKTYX = rows_YH @ (masks_BKTHW @ columns_XW.T)
    colours_BKC, backgrounds_BC = colours(scenes), backgrounds(scenes)
    if generator is not None:
        colours_BKC = colours_BKC + torch.randn(colours_BKC.shape, generator=generator) * 8
        backgrounds_BC = backgrounds_BC + torch.randn(backgrounds_BC.shape, generator=generator) * 5
    image_BTCYX = blend(masks_BKTYX, colours_BKC, backgrounds_BC)
    if generator is not None:
        gain_B = 1 + torch.randn(len(scenes), generator=generator) * 0.03
        image_BTCYX = image_BTCYX * gain_B[:, None, None, None, None]
        image_BTCYX = image_BTCYX + torch.randn(image_BTCYX.shape, generator=generator) * 2.5
    return image_BTCYX.clamp(0, 255) / 127.5 - 1


_matrices: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _resampling(height: int, width: int, processor: SmolVLMVideoProcessor) -> tuple[Tensor, Tensor]:
    """The processor's two resizes as matrices over rows [Y, H] and columns [X, W] of an oversampled drawing.

    The matrices come from resizing the unit vectors, so they have the filter of the installed torchvision.
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
