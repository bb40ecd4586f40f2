"""SmolVLM and SmolVLM2: a SigLIP tower whose patches are shuffled into few tokens per frame, then Llama-like layers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from functools import lru_cache
from math import isqrt
from typing import TYPE_CHECKING, Any

from f2l_vllm.base_models.spec import BaseModelSpec, ReleasedSize

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_500M, _2200M = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
_256M = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"  # released with the others, without a hypernetwork
VISION_HIDDEN_AT_ONCE = 2**24  # hidden activations of a vision MLP: 64 MiB in fp32, five frames of the released models


def prepare_frames(video_processor: Any, frames_FHW3: Tensor, longest_edge: int | None = None) -> dict[str, Tensor]:
    """What the family's video processor makes of upright RGB frames, without a mask of padding, which they have not.

    Its own call copies the frames into planes before it resizes them, which takes most of the time of a CPU, and
    resizes with another filter on a GPU.

    Args:
        video_processor: of transformers; the values it is configured with are used.
        frames_FHW3: uint8; everything is computed on their device.
        longest_edge: replaces the processor's size, pixels.

    Returns:
        pixel_values [1, F, 3, S, S] in fp32: on a CPU the processor's own, elsewhere within 1/255 of them.
    """
    from transformers.image_utils import PILImageResampling, SizeDict

    processor = video_processor
    size = processor.size if longest_edge is None else SizeDict(longest_edge=longest_edge)
    pixels = frames_FHW3.permute(0, 3, 1, 2)
    if processor.do_resize:
        if pixels.device.type == "cpu" or processor.resample != PILImageResampling.LANCZOS:
            pixels = processor.resize(pixels, size, processor.resample)
        else:
            pixels = resize_by_lanczos(processor, pixels, size)
    pixels = processor.rescale_and_normalize(
        pixels.contiguous(),
        processor.do_rescale,
        processor.rescale_factor,
        processor.do_normalize,
        tuple(processor.image_mean),
        tuple(processor.image_std),
    )
    return {"pixel_values": pixels[None]}


def resize_by_lanczos(video_processor: Any, pixels_F3HW: Tensor, size: Any) -> Tensor:
    """uint8 [F, 3, S, S] on the frames' device: the two steps of the video processor's `resize`."""
    from transformers.models.smolvlm.video_processing_smolvlm import get_resize_output_image_size

    from f2l_vllm.base_models import lanczos

    edge = video_processor.max_image_size["longest_edge"]
    first = (size.height, size.width)
    if size.longest_edge:
        first = get_resize_output_image_size(pixels_F3HW, size.longest_edge)
    return lanczos.resize(lanczos.resize(pixels_F3HW, first), (edge, edge))


def embed_frames(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Visual tokens [F, P, D]; the frames hold no padding.

    As transformers' `get_image_features`, whose parts are called here. That looks for frames and patches of padding,
    for which a GPU is waited for several times, and where the model computes in bf16, it rounds the places of patches
    before it looks up their positions: with 27 on a side, 6 rows and 6 columns get their neighbours' positions.
    """
    parameter = next(model.parameters())
    inner: Any = getattr(model, "model", model)
    vision = inner.vision_model
    pixels_F3SS = batch["pixel_values"].flatten(0, 1).to(parameter.device, parameter.dtype, non_blocking=True)
    patches = vision.embeddings.patch_embedding(pixels_F3SS)
    side = vision.embeddings.num_patches_per_side
    positions = patch_positions(vision.embeddings.__class__, side, tuple(patches.shape[-2:]), parameter.device)
    hidden = patches.flatten(2).transpose(1, 2) + vision.embeddings.position_embedding(positions)
    hidden = vision.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
    tokens: Tensor = inner.connector(vision.post_layernorm(hidden))
    return tokens


@lru_cache(maxsize=4)
def patch_positions(embeddings: Any, side: int, patches: tuple[int, int], device: torch.device | str) -> Tensor:
    """The position of every patch of a frame without padding, int64 [rows * columns].

    They are those of an fp32 model on a CPU, whatever the device and the dtype: such a one, of one dimension, gives
    every position its own number as its embedding.

    Args:
        embeddings: transformers' class for the vision tower's embeddings.
        side: patches on a side of the frames that the model was made for.
        patches: rows and columns of a frame.
        device: where the positions are wanted.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        with torch.device("meta"):  # draws no random weights
            numbers = embeddings(Namespace(hidden_size=1, image_size=side, patch_size=1, num_channels=1)).float()
        numbers.to_empty(device="cpu")
        for parameter in numbers.parameters():
            parameter.zero_()
        numbers.position_embedding.weight.copy_(torch.arange(side * side)[:, None])
        frame, everywhere = torch.zeros(1, 1, *patches), torch.ones(1, *patches, dtype=torch.bool)
        found: Tensor = numbers(pixel_values=frame, patch_attention_mask=everywhere)
        return found.flatten().long().to(device)


def frames_at_once(config: Any) -> int:
    """How many frames keep the vision tower's hidden activations below `VISION_HIDDEN_AT_ONCE`."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return max(1, VISION_HIDDEN_AT_ONCE // (patches * vision.intermediate_size))


def random_model(size: ReleasedSize, tokenizer: Any, chat_template: str) -> tuple[Any, nn.Module]:
    """A processor and a model with random weights in torch's default dtype.

    Args:
        tokenizer: has the tokens that the processor writes around frames.
    """
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    edge = {"longest_edge": size.vision["image_size"]}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False),
        tokenizer,
        SmolVLMVideoProcessor(size=edge, max_image_size=edge, num_frames=64, fps=1),
        image_seq_len=size.tokens_per_frame,
        chat_template=chat_template,
    )
    text = {"model_type": "llama", "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, **size.text}
    ids = {"pad_token_id": tokenizer.pad_token_id}
    config = SmolVLMConfig(
        vision_config=dict(size.vision),
        text_config={**text, **ids},
        scale_factor=size.vision["image_size"] // size.vision["patch_size"] // isqrt(size.tokens_per_frame),
        image_token_id=processor.image_token_id,
        **ids,
    )
    return processor, SmolVLMForConditionalGeneration(config)


_SIZES = {
    "500M": ReleasedSize(
        "SmolVLM2-500M",
        {
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "vocab_size": 49280,
        },
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        tokens_per_frame=64,
    ),
    "2.2B": ReleasedSize(
        "SmolVLM2-2.2B",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 49280,
        },
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        tokens_per_frame=81,
    ),
}

SPEC = BaseModelSpec(
    name="smolvlm",
    example=_500M,
    text_config="text_config",
    text_model="text_model",
    peft_prefix="base_model.model.model.text_model.layers",
    prepare_frames=prepare_frames,
    embed_frames=embed_frames,
    frames_at_once=frames_at_once,
    architecture="SmolVLMForConditionalGeneration",
    vllm_class="f2l_vllm.engine.base_models.smolvlm:SmolVLMVideoForConditionalGeneration",
    video_processors=("SmolVLMVideoProcessor",),
    random_model=random_model,
    hypernetworks="MananSuri27/Frames2LoRA-SmolVLM-ckpts",  # Frames2LoRA, MIT
    released_for=(_500M, _2200M),
    released_sizes=_SIZES,
    known_sizes={
        (32, 960, 2560, 15, 12, 768): _500M,
        (24, 2048, 8192, 32, 27, 1152): _2200M,
        (30, 576, 1536, 9, 12, 768): _256M,
    },
)
