"""SmolVLM and SmolVLM2: a SigLIP tower whose patches are shuffled into few tokens per frame, then Llama-like layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from f2l_vllm.base_models.spec import BaseModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

_500M, _2200M = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
_256M = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"  # released with the others, without a hypernetwork
VISION_HIDDEN_AT_ONCE = 2**24  # hidden activations of a vision MLP: 64 MiB in fp32, five frames of the released models


def embed_frames(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Visual tokens [F, P, D]; the frames hold no padding."""
    parameter = next(model.parameters())
    inner: Any = getattr(model, "model", model)
    mask = batch.get("pixel_attention_mask")
    tokens: Tensor = inner.get_image_features(
        pixel_values=batch["pixel_values"].to(parameter.device, parameter.dtype),
        pixel_attention_mask=None if mask is None else mask.bool().to(parameter.device),
    ).pooler_output
    return tokens


def frames_at_once(config: Any) -> int:
    """How many frames keep the vision tower's hidden activations below `VISION_HIDDEN_AT_ONCE`."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return max(1, VISION_HIDDEN_AT_ONCE // (patches * vision.intermediate_size))


SPEC = BaseModelSpec(
    name="smolvlm",
    example=_500M,
    text_config="text_config",
    text_model="text_model",
    peft_prefix="base_model.model.model.text_model.layers",
    embed_frames=embed_frames,
    frames_at_once=frames_at_once,
    architecture="SmolVLMForConditionalGeneration",
    vllm_class="f2l_vllm.engine.base_models.smolvlm:SmolVLMVideoForConditionalGeneration",
    video_processors=("SmolVLMVideoProcessor",),
    hypernetworks="MananSuri27/Frames2LoRA-SmolVLM-ckpts",  # Frames2LoRA, MIT
    released_for=(_500M, _2200M),
    known_sizes={
        (32, 960, 2560, 15, 12, 768): _500M,
        (24, 2048, 8192, 32, 27, 1152): _2200M,
        (30, 576, 1536, 9, 12, 768): _256M,
    },
)
