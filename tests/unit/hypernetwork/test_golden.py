"""Pixels to logits, step by step, as the published implementation computes them (see golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BatchFeature

from f2l_vllm.hypernetwork.adapter import apply_adapter
from f2l_vllm.hypernetwork.encoder import VideoEncoder
from f2l_vllm.hypernetwork.model import Hypernetwork

GOLDEN = Path(__file__).parent / "golden"
CLOSE = {"rtol": 0.0, "atol": 1e-5}  # 1e-4 is what fp32 on another machine may need; this leaves room to notice


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(GOLDEN / "vlm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hyper() -> Hypernetwork:
    return Hypernetwork.load(GOLDEN / "hypernetwork.pt")


@pytest.fixture(scope="module")
def encoded(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    return VideoEncoder(model, None).features(BatchFeature(inputs))


def test_features_of_a_padded_batch(encoded: tuple, expected: dict[str, torch.Tensor]) -> None:
    features_BLTD, mask_BT = encoded
    torch.testing.assert_close(features_BLTD, expected["features"], **CLOSE)
    assert torch.equal(mask_BT, expected["attention_mask"].bool())


def test_generated_and_single_video_factors(
    hyper: Hypernetwork, encoded: tuple, expected: dict[str, torch.Tensor]
) -> None:
    generated = hyper(*encoded)
    single = hyper.combine([generated])
    for index, letter in enumerate("AB"):
        want = expected[f"generated.down_proj.{letter}"]
        assert want.abs().max() > 50 * CLOSE["atol"]
        torch.testing.assert_close(generated["down_proj"][index], want, **CLOSE)
        torch.testing.assert_close(single["down_proj"][index], expected[f"single.down_proj.{letter}"], **CLOSE)


def test_composed_factors_and_all_logits(
    model: torch.nn.Module, hyper: Hypernetwork, encoded: tuple, expected: dict[str, torch.Tensor]
) -> None:
    features_BLTD, mask_BT = encoded
    chunks = [hyper.generate(features, mask) for features, mask in zip(features_BLTD, mask_BT, strict=True)]
    alone, composed = hyper.compose(chunks[:1]), hyper.compose(chunks)
    assert (alone.rank, composed.rank) == (8, 12)
    for index, letter in enumerate("AB"):
        torch.testing.assert_close(
            composed.factors["down_proj"][index], expected[f"composed.down_proj.{letter}"][0], **CLOSE
        )
    with torch.no_grad():
        torch.testing.assert_close(model(expected["prompt_ids"]).logits, expected["logits_base"], **CLOSE)
        for adapter, name in ((alone, "logits_adapter_0"), (composed, "logits_composed")):
            with apply_adapter(model, adapter):
                logits = model(expected["prompt_ids"]).logits
            assert (expected[name] - expected["logits_base"]).abs().max() > 1000 * CLOSE["atol"]
            torch.testing.assert_close(logits, expected[name], **CLOSE)
        torch.testing.assert_close(model(expected["prompt_ids"]).logits, expected["logits_base"], **CLOSE)


def test_our_directory_holds_the_same_hypernetwork(hyper: Hypernetwork, tmp_path: Path) -> None:
    hyper.save(tmp_path / "copy", dtype=torch.float32)
    copy = Hypernetwork.load(tmp_path / "copy")
    assert copy.config == hyper.config
    assert copy.revision == hyper.revision
    assert hyper.scale == 16.0
