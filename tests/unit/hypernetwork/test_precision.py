"""What computing in bf16 and TF32, as on a GPU, does to an adapter: it is shown on the golden vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, BatchFeature

from f2l_vllm.hypernetwork import internalizer, precision
from f2l_vllm.hypernetwork.adapter import Adapter, apply_adapter
from f2l_vllm.hypernetwork.adapter import apart as adapters_apart
from f2l_vllm.hypernetwork.encoder import VideoEncoder
from f2l_vllm.hypernetwork.internalizer import Internalizer
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.hypernetwork.precision import reading_dtype, use_tf32

GOLDEN = Path(__file__).parent / "golden"
READ_IN_BF16 = 0.02  # of a layer's change of weights; 0.0138 at most is measured on the two golden videos
ANSWERS = 0.01  # of the effect on the logits; 0.0057 is measured


class Tf32(TorchDispatchMode):
    """Rounds the fp32 factors of every matrix product to TF32's ten bits, as a GPU does before it multiplies."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            self.products += 1
            args = tuple(_rounded(each) for each in args)
        return func(*args, **(kwargs or {}))


def _rounded(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def change(adapter: Adapter, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the adapter adds to each layer's weights, its factors rounded to `dtype`: [L, I, O]."""
    a, b = (factor.to(dtype).double() for factor in adapter.factors["down_proj"])
    return torch.einsum("lri,lro->lio", a, b)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of a layer, as a part of its norm."""
    return ((one - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)).max().item()


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def hyper() -> Hypernetwork:
    return Hypernetwork.load(GOLDEN / "hypernetwork.pt")


def features(expected: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    model = AutoModelForImageTextToText.from_pretrained(GOLDEN / "vlm", dtype=dtype).eval()
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    return zip(*VideoEncoder(model, None).features(BatchFeature(inputs)), strict=True)


@torch.no_grad()
def adapters(hyper: Hypernetwork, expected: dict[str, Tensor], dtype: torch.dtype) -> list[Adapter]:
    return [hyper.compose([hyper.generate(*one)]) for one in features(expected, dtype)]


def test_a_model_that_reads_in_bf16_changes_an_adapter_by_less_than_two_percent(
    hyper: Hypernetwork, expected: dict[str, Tensor]
) -> None:
    exact = adapters(hyper, expected, torch.float32)
    with Tf32() as tf32:
        fast = adapters(hyper, expected, torch.bfloat16)
    assert tf32.products > 50
    for one, other in zip(fast, exact, strict=True):
        assert 0.001 < apart(change(one), change(other)) < READ_IN_BF16
    model = AutoModelForImageTextToText.from_pretrained(GOLDEN / "vlm", dtype=torch.float32).eval()
    for one, other in zip(fast, exact, strict=True):
        with torch.no_grad(), apply_adapter(model, one):
            quick = model(expected["prompt_ids"]).logits
        with torch.no_grad(), apply_adapter(model, other):
            logits = model(expected["prompt_ids"]).logits
        effect = (logits - expected["logits_base"]).norm()
        assert (quick - logits).norm() < ANSWERS * effect


def test_tf32_changes_an_adapter_by_less_than_its_own_file_does(
    hyper: Hypernetwork, expected: dict[str, Tensor]
) -> None:
    exact = adapters(hyper, expected, torch.float32)
    read = list(features(expected, torch.float32))
    with torch.no_grad(), Tf32():
        fast = [hyper.compose([hyper.generate(*one)]) for one in read]
    for one, other in zip(fast, exact, strict=True):
        published = apart(change(other, torch.bfloat16), change(other))
        assert 0 < apart(change(one), change(other)) < published


def test_the_precision_goes_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype in ((True, None), (False, torch.float32)):
        monkeypatch.setattr(precision, "has_bf16_instructions", lambda native=native: native)
        assert reading_dtype(torch.device("cpu")) is dtype
    for native, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert reading_dtype(torch.device("cuda")) is dtype
    before = torch.get_float32_matmul_precision()
    try:
        use_tf32()
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("given", [None, torch.bfloat16])
def test_an_internalizer_reads_in_the_devices_precision_unless_told_another(
    given: torch.dtype | None, hypernetwork_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internalizer, "reading_dtype", lambda device: torch.float16 if device.type == "cpu" else None)
    loaded = Internalizer.load(hypernetwork_model, hypernetwork_model / "hypernetwork", "cpu", given)
    assert next(loaded.model.parameters()).dtype == (given or torch.float16)
    assert loaded.hyper.head.weight.dtype == torch.float32


def test_how_far_adapters_are_apart_is_told_from_their_factors() -> None:
    torch.manual_seed(0)
    one, other = (Adapter({"down_proj": (torch.randn(3, 4, 5), torch.randn(3, 4, 6))}, scale) for scale in (2.0, 0.5))
    expected = (2 * change(one) - 0.5 * change(other)).norm() / (2 * change(one)).norm()
    assert adapters_apart(one, other) == pytest.approx(float(expected))
    assert adapters_apart(one, one) == pytest.approx(0.0, abs=1e-6)
