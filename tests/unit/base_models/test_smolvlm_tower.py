"""The vision tower called in parts: transformers' own tokens, positions that no dtype shifts, and nobody waits."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor, SmolVLMConfig, SmolVLMModel
from transformers import __version__ as transformers_version
from vllm.model_executor.models.idefics2_vision_model import Idefics2VisionEmbeddings

from f2l_vllm import vllm_versions
from f2l_vllm.base_models import lanczos
from f2l_vllm.base_models.smolvlm import embed_frames, patch_positions
from f2l_vllm.hypernetwork.encoder import VideoEncoder
from f2l_vllm.models import DEFAULT_MODEL, resolve
from f2l_vllm.video.sample import Sampling

RELEASED = {4: 2, 27: 3, 32: 4}  # patches on a side of f2l-tiny, 2.2B and 500M -> how many become one token's side
ROUNDED_BY_FP32_TOO = 25
WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose"}
WAITS |= {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::repeat_interleave"}


def model_of(side: int, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> SmolVLMModel:
    """Patches of 2 pixels, and weights large enough that every patch's position matters to its token."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    config = SmolVLMConfig(
        vision_config={**vision, "image_size": 2 * side, "patch_size": 2},
        text_config={**text, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0},
        scale_factor=RELEASED.get(side, 1),
        image_token_id=1,
        pad_token_id=0,
        attn_implementation=attention,
    )
    model = SmolVLMModel(config).eval().requires_grad_(False)
    for parameter in model.vision_model.parameters():
        parameter.normal_(0.0, 0.3)
    return model.to(dtype)


def frames(side: int, number: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(1, number, 3, 2 * side, 2 * side) * 2 - 1}


def own(model: SmolVLMModel, batch: dict[str, Tensor]) -> Tensor:
    """What transformers computes from a model's inputs."""
    tokens: Tensor = model.get_image_features(batch["pixel_values"]).pooler_output
    return tokens


def positions(model: SmolVLMModel, read: Any, side: int) -> Tensor:
    """Of every patch, as the tower looks them up."""
    seen: list[Tensor] = []
    lookup = model.vision_model.embeddings.position_embedding
    with lookup.register_forward_pre_hook(lambda _module, given: seen.append(given[0])):
        read(model, frames(side, 1))
    return seen[0].flatten()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", [*RELEASED, ROUNDED_BY_FP32_TOO])
def test_in_fp32_the_tokens_are_transformers_own(side: int, attention: str) -> None:
    model, batch = model_of(side, attention=attention), frames(side)
    assert torch.equal(embed_frames(model, batch), own(model, batch))


def test_in_bf16_so_they_are_where_no_position_is_rounded() -> None:
    for side in (4, 32):
        model, batch = model_of(side, torch.bfloat16), frames(side)
        assert torch.equal(embed_frames(model, batch), own(model, batch))


def test_a_frame_of_another_size_has_positions_spread_over_the_towers() -> None:
    model = model_of(32)
    assert torch.equal(positions(model, embed_frames, 8), positions(model, own, 8))
    assert positions(model, embed_frames, 8)[:2].tolist() == [0, 4]


@pytest.mark.parametrize("side", RELEASED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_are_those_of_fp32_whatever_the_dtype(side: int, dtype: torch.dtype) -> None:
    exact = positions(model_of(side), own, side)
    assert exact.tolist() == list(range(side * side))
    assert torch.equal(positions(model_of(side, dtype), embed_frames, side), exact)


def test_transformers_itself_shifts_six_rows_and_columns_of_the_largest_model_in_bf16() -> None:
    """Once it does not, `patch_positions` is not needed for the dtype."""
    rows = positions(model_of(27, torch.bfloat16), own, 27).view(27, 27)[:, 0] // 27
    changed = f"transformers {transformers_version} rounds positions another way: see base_models/smolvlm.py"
    assert [row for row in range(27) if rows[row] != row] == [15, 17, 19, 21, 23, 25], changed


def test_vllms_own_tower_shifts_one_in_every_dtype() -> None:
    """As `docs/start/gpu.md` says; frames in a question's prompt pass that tower."""
    tower: Any = Namespace(num_patches_per_side=27, position_embedding=torch.nn.Embedding(1, 1))
    found = Idefics2VisionEmbeddings.get_position_ids(tower, torch.ones(1, 27, 27, dtype=torch.bool))
    rows = found.view(27, 27)[:, 0] // 27
    assert {row: at for row, at in enumerate(rows.tolist()) if at != row} == {10: 9}, vllm_versions.installed()


def test_a_shift_of_positions_changes_tokens_and_is_gone() -> None:
    batch = frames(27)
    exact, ours, shifted = (
        embed(model_of(27, dtype), batch).float()
        for dtype, embed in ((torch.float32, own), (torch.bfloat16, embed_frames), (torch.bfloat16, own))
    )
    assert 3 * (ours - exact).norm() < (shifted - exact).norm()


def test_positions_take_no_random_numbers_and_may_be_trained_with() -> None:
    kind = type(model_of(5).vision_model.embeddings)
    patch_positions.cache_clear()
    before = torch.get_rng_state()
    with torch.inference_mode():
        found = patch_positions(kind, 5, (5, 5), "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert (found.dtype, found.is_inference(), found.requires_grad) == (torch.int64, False, False)


class Waits(TorchDispatchMode):
    """The operators for whose result a GPU is waited for: values read on the host, lengths that depend on data, and
    copies to or from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func._schema.name, kwargs or {}
        result = func(*args, **given)
        chosen = args[1] if name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], list) else []
        by_mask = any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in chosen)
        from_, to = (args[1], args[0]) if name == "aten::copy_" else (args[0] if args else None, result)
        copied = name in ("aten::copy_", "aten::_to_copy") and from_.device != to.device
        if name in WAITS or by_mask or (copied and not given.get("non_blocking")):
            self.found.append(name)
        return result


def test_the_tower_waits_for_nothing_where_transformers_does_four_times() -> None:
    model, batch = model_of(4), frames(4)
    embed_frames(model, batch)  # computes positions once, on the CPU
    with Waits() as ours:
        embed_frames(model, batch)
    with Waits() as stock:
        own(model, batch)
    assert ours.found == []
    assert len(stock.found) == 4


def test_reading_a_video_waits_once_for_each_batch_of_frames() -> None:
    """On torch's device without storage: what needs a value there is an error, as a GPU would be waited for."""
    processor = AutoProcessor.from_pretrained(resolve(DEFAULT_MODEL))
    edge = processor.video_processor.max_image_size["longest_edge"]
    encoder = VideoEncoder(model_of(edge // 2).to("meta"), processor)
    video: Any = Namespace(frames=np.zeros((40, 60, 90, 3), np.uint8), sampling=Sampling())
    encoder.see(video)  # the filter's weights and the like are there after the first batch
    with Waits() as waits:
        visual = encoder.see(video)
    assert visual.device.type == "meta"
    assert waits.found == ["aten::_to_copy"] * 3
    assert lanczos.taps.cache_info().hits
