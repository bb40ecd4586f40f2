"""Small random checkpoints with the real classes and files: SmolVLM (model, processor, tokenizer, template), LoRA.

What a test needs of a model is that it is built, saved, tokenized and templated as a downloaded one is, and that its
answers depend on every input. Size and skill do not matter, so everything here is made in about a second.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

# SmolVLM's own template: a turn that starts with an image has no space after the colon.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_CORPUS = (
    "You are provided the following series of eight frames from a 0:00:08 [H:MM:SS] video. Frame from 00:01: "
    "User: What is shown in the video? Assistant: The quick brown fox jumps over the lazy dog. "
    "Describe the image in detail. Which colour is the square, and where does the circle move? "
    "Internalize this video for later captioning. A red triangle grows while the blue star blinks on the left. "
    "Markup such as <b> bold </b> or <i> slanted </i> makes <video> part of a longer token, as in large vocabularies. "
)
_IMAGE_SIZE, _NUM_FRAMES = 32, 8
_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]


def make_smolvlm(directory: Path | str, *, video_token_in_vocabulary: bool = False) -> Path:
    """Write a random SmolVLM checkpoint and return its directory.

    Four vision tokens per frame or tile; images larger than `_IMAGE_SIZE` are split into tiles as in the released
    models; videos are sampled at one frame per second, at most `_NUM_FRAMES`. `<video>` is plain text for the
    tokenizer, as in the released models, unless `video_token_in_vocabulary`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _make_tokenizer(["<video>"] if video_token_in_vocabulary else [])
    scale_factor = 2
    _make_processor(tokenizer, 16 // scale_factor**2).save_pretrained(directory)

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_config = dict(
        model_type="llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **ids,
    )
    vision_config = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": _IMAGE_SIZE,
        "patch_size": _IMAGE_SIZE // 4,
    }
    config = SmolVLMConfig(
        text_config=text_config,
        vision_config=vision_config,
        scale_factor=scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmolVLMForConditionalGeneration(config)
    _widen(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    return directory


def make_lora(
    directory: Path | str,
    base: Path | str,
    rank: int,
    seed: int,
    *,
    strength: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random PEFT adapter on every text `down_proj` of the checkpoint `base`, with `lora_alpha == r`.

    `strength` is the size of the adapter's output relative to its input, whatever the rank.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.loads((Path(base) / "config.json").read_text())["text_config"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(text["num_hidden_layers"]):
        prefix = f"base_model.model.model.text_model.layers.{layer}.mlp.down_proj"
        a_RI = torch.randn(rank, text["intermediate_size"], generator=generator) / text["intermediate_size"] ** 0.5
        b_OR = torch.randn(text["hidden_size"], rank, generator=generator) * strength / rank**0.5
        tensors[f"{prefix}.lora_A.weight"] = a_RI.to(dtype).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = b_OR.to(dtype).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": r".*text_model.*\.down_proj",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory


def _make_tokenizer(extra_special: list[str]) -> PreTrainedTokenizerFast:
    special = [*_SPECIAL, *extra_special]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    roles = {
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[token for token in special if token not in roles.values()],
        model_max_length=4096,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
        **roles,
    )


def _make_processor(tokenizer: PreTrainedTokenizerFast, image_seq_len: int) -> SmolVLMProcessor:
    normalize = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = SmolVLMImageProcessor(
        size={"longest_edge": 2 * _IMAGE_SIZE},
        max_image_size={"longest_edge": _IMAGE_SIZE},
        do_image_splitting=True,
        **normalize,
    )
    videos = SmolVLMVideoProcessor(
        size={"longest_edge": _IMAGE_SIZE},
        max_image_size={"longest_edge": _IMAGE_SIZE},
        do_sample_frames=True,
        num_frames=_NUM_FRAMES,
        fps=1,
        **normalize,
    )
    return SmolVLMProcessor(images, tokenizer, videos, image_seq_len=image_seq_len, chat_template=CHAT_TEMPLATE)


def _widen(model: SmolVLMForConditionalGeneration) -> None:
    """Scale the weights so that attention is peaked and logits differ: default ones answer the same to everything."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0 if "vision" in name else 6.0)
