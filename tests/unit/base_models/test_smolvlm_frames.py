"""Frames as the model gets them: the video processor's own pixels, from fewer copies and on any device."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor
from transformers.image_utils import SizeDict

from f2l_vllm.base_models import lanczos
from f2l_vllm.base_models.smolvlm import prepare_frames, resize_by_lanczos
from f2l_vllm.models import DEFAULT_MODEL, resolve

SIZES = [(360, 640), (640, 360), (64, 48), (33, 97), (512, 512), (20, 300), (16, 16)]
STEP = 2 / 255  # one of 255 levels, after normalising to -1..1


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(resolve(DEFAULT_MODEL)).video_processor


@pytest.fixture(params=[(32, 32), (512, 128), (96, 384)], ids=str)
def scaled(processor, request, monkeypatch):
    """The processor, scaling down to its square, or first up or down."""
    edge, square = request.param
    monkeypatch.setattr(processor, "size", SizeDict(longest_edge=edge))
    monkeypatch.setattr(processor, "max_image_size", {"longest_edge": square})
    return processor


def frames_of(height, width):
    """Noise, whose resized values overshoot, beside an edge and a slope."""
    frames = np.random.default_rng(height * width).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    frames[1, :, : width // 2], frames[1, :, width // 2 :] = 0, 255
    frames[2] = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    return frames


def expected(processor, frames):
    return processor([frames], do_sample_frames=False, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_on_a_cpu_they_are_the_processors_own(scaled, size):
    frames = frames_of(*size)
    found = prepare_frames(scaled, torch.from_numpy(frames))["pixel_values"]
    assert torch.equal(found, expected(scaled, frames))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_with_the_filter_for_other_devices_no_value_is_more_than_a_level_away(scaled, size, monkeypatch):
    frames = frames_of(*size)
    wanted = expected(scaled, frames)
    monkeypatch.setattr(scaled, "resize", lambda pixels, size, _resample: resize_by_lanczos(scaled, pixels, size))
    found = prepare_frames(scaled, torch.from_numpy(frames))["pixel_values"]
    assert (found - wanted).abs().max() <= STEP * 1.001


def test_the_hypernetworks_longest_edge_replaces_the_processors(processor):
    frames = frames_of(60, 90)
    found = prepare_frames(processor, torch.from_numpy(frames), 20)["pixel_values"]
    size = {"longest_edge": 20}
    assert torch.equal(
        found, processor([frames], do_sample_frames=False, return_tensors="pt", size=size)["pixel_values"]
    )
    assert not torch.equal(found, expected(processor, frames))


def test_off_the_cpu_every_step_is_on_the_frames_device_with_the_processors_filter(processor, monkeypatch):
    resized = []
    filtered = lanczos.resize
    monkeypatch.setattr(lanczos, "resize", lambda images, size: resized.append(size) or filtered(images, size))
    found = prepare_frames(processor, torch.empty(4, 60, 90, 3, dtype=torch.uint8, device="meta"))["pixel_values"]
    assert found.device.type == "meta"
    assert found.shape == (1, 4, 3, 32, 32)
    assert resized == [(22, 32), (32, 32)]


class LargestOf(TorchDispatchMode):
    """The most numbers in an fp32 tensor that any operator returns."""

    numbers = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("size", [(2160, 3840), (4320, 7680), (8192, 512), (512, 8192)], ids=str)
def test_large_frames_are_numbers_a_piece_at_a_time(processor, size):
    with LargestOf() as largest:
        prepare_frames(processor, torch.empty(16, *size, 3, dtype=torch.uint8, device="meta"))
    assert 0 < largest.numbers <= 1 << 24


@pytest.mark.parametrize("resized", [(30, 45), (60, 45), (30, 90), (120, 180)], ids=str)
@pytest.mark.parametrize("at_once", [1, 1000, 5000])
def test_pieces_make_the_same_pixels(resized, at_once, monkeypatch):
    images = torch.from_numpy(frames_of(60, 90)).permute(0, 3, 1, 2)
    whole = lanczos.resize(images, resized)
    parts = []
    rounded = lanczos._rounded
    monkeypatch.setattr(lanczos, "_VALUES_AT_ONCE", at_once)
    monkeypatch.setattr(lanczos, "_rounded", lambda values: parts.append(values) or rounded(values))
    assert torch.equal(lanczos.resize(images, resized), whole)
    assert len(parts) >= 10


@pytest.mark.parametrize("size", [(32, 640), (97, 96), (5, 1)])
def test_a_plain_surface_stays_as_it_is(size):
    for level in (0, 7, 255):
        plain = torch.full((1, 3, 60, 90), level, dtype=torch.uint8)
        assert torch.equal(lanczos.resize(plain, size), torch.full((1, 3, *size), level, dtype=torch.uint8))


class Fewer(TorchDispatchMode):
    """Rounds the factors of every matrix product to so many bits after the point, as a GPU with TF32 (10) or bf16 (7)
    does before it multiplies."""

    def __init__(self, bits):
        super().__init__()
        self.dropped, self.products = 23 - bits, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::bmm"):
            self.products += 1
            half = 1 << (self.dropped - 1)
            args = [((each.contiguous().view(torch.int32) + half) & -2 * half).view(torch.float32) for each in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [10, 7], ids=["TF32", "bf16"])
@pytest.mark.parametrize("size", [(32, 32), (100, 700), (384, 512)])
def test_products_of_fewer_bits_give_the_same_bytes(bits, size):
    pixels = torch.from_numpy(frames_of(360, 640)).permute(0, 3, 1, 2)
    with Fewer(bits) as fewer:
        found = lanczos.resize(pixels, size)
    assert fewer.products == 4
    assert torch.equal(found, lanczos.resize(pixels, size))


SETTINGS = {
    "exact": lambda: None,
    "in TF32": lambda: torch.set_float32_matmul_precision("high"),
    "in bf16": lambda: torch.set_float32_matmul_precision("medium"),
    "by the newer name": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "by both": lambda: (
        torch.set_float32_matmul_precision("high") or setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    ),
}


def read(*names):
    """The settings that torch tells, and the errors in place of those that were made by an older and a newer name."""
    found = []
    for name in names:
        try:
            found.append(name())
        except RuntimeError as error:
            found.append(type(error))
    return found


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_whatever_others_have_set_for_products_stays(setting):
    matmul = torch.backends.cuda.matmul
    settings = (torch.get_float32_matmul_precision, lambda: matmul.allow_tf32, lambda: matmul.fp32_precision)
    before = torch.get_float32_matmul_precision()
    try:
        setting()
        was = read(*settings)
        lanczos.resize(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (4, 4))
        assert read(*settings) == was
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.fp32_precision = "ieee"
        assert torch.get_float32_matmul_precision() == before
