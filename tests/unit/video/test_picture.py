"""Pictures are read in a process of its own, as vLLM would read them, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from f2l_vllm.video.decoder import DecodeLimits, IsolatedDecoder
from f2l_vllm.video.errors import VideoError

WHITE = (255, 255, 255)
PIXEL = b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"  # of a GIF, in a corner of its canvas


@pytest.fixture(scope="module")
def decoder():
    decoder = IsolatedDecoder(DecodeLimits(seconds=5, memory_bytes=1 << 30, output_bytes=3_000_000, nice=5))
    yield decoder
    decoder.close()


def saved(path, image, kind="PNG", **options):
    image.save(path, kind, **options)
    return path


def noise(mode, size=(37, 23)):
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def upside_down(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(path, noise("RGB"), "JPEG", exif=exif)


def palette(path):
    image = noise("RGB").quantize(16)
    image.info["transparency"] = 3
    return saved(path, image, transparency=3)


PICTURES = {
    "rgb": lambda path: saved(path, noise("RGB")),
    "rgba": lambda path: saved(path, noise("RGBA")),
    "grey": lambda path: saved(path, noise("L")),
    "grey with alpha": lambda path: saved(path, noise("LA")),
    "bits": lambda path: saved(path, noise("L").convert("1")),
    "16 bits": lambda path: saved(path, Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)),
    "palette": palette,
    "jpeg": lambda path: saved(path, noise("RGB"), "JPEG"),
    "cmyk": lambda path: saved(path, noise("CMYK"), "JPEG"),
    "turned": upside_down,
    "webp": lambda path: saved(path, noise("RGBA"), "WEBP", lossless=True),
    "gif": lambda path: saved(path, noise("RGB"), "GIF", save_all=True, append_images=[noise("RGB").rotate(90)]),
    "bmp": lambda path: saved(path, noise("RGB"), "BMP"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_the_pixels_are_those_that_vllm_would_read(decoder, tmp_path, kind):
    from vllm.multimodal.media.image import ImageMediaIO

    path = PICTURES[kind](tmp_path / "picture")
    for background in (WHITE, (10, 20, 30)):
        expected = ImageMediaIO(rgba_background_color=background).load_bytes(path.read_bytes()).media
        assert np.array_equal(decoder.picture(path, 1_000_000, background), np.asarray(expected))


def bomb(width, height):
    """A PNG that claims so many pixels, and holds none."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def whole(kind):
    file = io.BytesIO()
    noise("RGB", (200, 100)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (bomb(13_300, 13_300), "image_too_large"),
        (bomb(2**31 - 1, 2**31 - 1), "image_too_large"),
        (bomb(1_001, 1_000), "image_too_large"),
        (bomb(0, 5), "invalid_image"),
        (b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0" + PIXEL, "image_too_large"),
        (b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0", "invalid_image"),
        (whole("PNG")[:-2000], "invalid_image"),
        (whole("JPEG")[:-200], "invalid_image"),
        (whole("TIFF"), "invalid_image"),
        (whole("ICO"), "invalid_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "invalid_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image"),
        (b"", "invalid_image"),
        (b"\0" * 1000, "invalid_image"),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused_and_the_next_is_read(decoder, tmp_path, data, code):
    path = tmp_path / "picture"
    path.write_bytes(data)
    with pytest.raises(VideoError) as error:
        decoder.picture(path, 1_000_000, WHITE)
    assert error.value.code == code
    assert str(tmp_path) not in error.value.message
    assert decoder.picture(PICTURES["rgb"](tmp_path / "next"), 1_000_000, WHITE).shape == (23, 37, 3)
