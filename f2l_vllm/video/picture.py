"""A still picture as RGB, as vLLM would load it; a picture that is too large is refused before it is decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from f2l_vllm.video.errors import VideoError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of the many that Pillow opens


def decode_picture(path: str | Path, max_pixels: int, background: Sequence[int]) -> np.ndarray:
    """Decode a picture, or the first frame of an animation: uint8 [H, W, 3], upright.

    Args:
        path: of the file.
        max_pixels: limit of the picture.
        background: RGB behind transparent parts.

    Raises:
        VideoError: `invalid_image`, `image_too_large`.
    """
    Image.MAX_IMAGE_PIXELS = None  # the operator's limit is checked below
    try:
        image: Image.Image = Image.open(path, formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise VideoError(
                "image_too_large",
                f"The picture has {width}x{height} pixels, and a question's pictures together may have "
                f"{max_pixels / 1e6:.4g} million more: scale it down.",
            )
        with contextlib.suppress(Exception):  # a damaged EXIF block means no rotation
            image = ImageOps.exif_transpose(image)
        image.load()
        return np.asarray(_as_rgb(image, tuple(background)))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        message = f"The picture cannot be read ({error}): send a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file."
        raise VideoError("invalid_image", message.replace(str(path), "it")) from error


def _as_rgb(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        whole = Image.new("RGB", image.size, background)
        whole.paste(image, mask=image.split()[3])
        return whole
    return image.convert("RGB")
