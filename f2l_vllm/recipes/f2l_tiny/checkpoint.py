"""The default model's directory: a tiny but ordinary SmolVLM checkpoint.

The directory loads with `AutoProcessor` and `AutoModelForImageTextToText`, and vLLM serves it like SmolVLM2: same
architecture, same processor classes, same prompt layout, smaller numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from f2l_vllm.hypernetwork.weights import write_weights
from f2l_vllm.recipes.f2l_tiny import tokenizer as tokens

IMAGE_SIZE = 32
PATCH_SIZE = 8
SCALE_FACTOR = 2  # pixel shuffle: 2 x 2 patches become one token
TOKENS_PER_FRAME = (IMAGE_SIZE // PATCH_SIZE // SCALE_FACTOR) ** 2
NUM_FRAMES = 8
SAMPLE_FPS = 4.0  # eight frames of anything that lasts two seconds or more

# SmolVLM2's template, extended to plain string contents, no content at all, and `input_*`-less parts in any order.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% set content = message['content'] %}"
    "{% if content is string %}{{ ': ' + content }}"
    "{% elif not content %}{{ ': ' }}"
    "{% else %}{{ ':' if content[0]['type'] == 'image' else ': ' }}"
    "{% for part in content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def build_processor() -> SmolVLMProcessor:
    """The processor with the default model's tokenizer, sizes and sampling."""
    size = {"longest_edge": IMAGE_SIZE}
    image_processor = SmolVLMImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    video_processor = SmolVLMVideoProcessor(size=size, max_image_size=size, num_frames=NUM_FRAMES, fps=SAMPLE_FPS)
    return SmolVLMProcessor(
        image_processor,
        tokens.build_tokenizer(),
        video_processor,
        image_seq_len=TOKENS_PER_FRAME,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: SmolVLMProcessor, *, seed: int = 0) -> SmolVLMForConditionalGeneration:
    """A model for the processor's vocabulary, in fp32, with a random initialisation that suits its width."""
    tokenizer = processor.tokenizer
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
        },
        scale_factor=SCALE_FACTOR,
        image_token_id=tokenizer.convert_tokens_to_ids(tokens.IMAGE),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(config)
    _initialise(model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model.eval()


def _initialise(model: SmolVLMForConditionalGeneration) -> None:
    """Scale the weights to their fan-in: the usual standard deviation of 0.02 suits widths near a thousand."""
    for name, parameter in model.named_parameters():
        if "patch_embedding.weight" in name:
            torch.nn.init.normal_(parameter, std=(3 * PATCH_SIZE**2) ** -0.5)
        elif "position_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name:
            torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
    with torch.no_grad():
        for layer in model.model.text_model.layers:  # residual branches start small
            layer.mlp.down_proj.weight.mul_(0.4)
            layer.self_attn.o_proj.weight.mul_(0.4)
        for layer in model.model.vision_model.encoder.layers:
            layer.mlp.fc2.weight.mul_(0.5)
            layer.self_attn.out_proj.weight.mul_(0.5)


def build_checkpoint(directory: str | Path, *, seed: int = 0) -> Path:
    """Write a complete, loadable model directory with random weights.

    Returns:
        The directory.
    """
    processor = build_processor()
    return save_checkpoint(directory, processor, build_model(processor, seed=seed))


def save_checkpoint(directory: str | Path, processor: SmolVLMProcessor, model: SmolVLMForConditionalGeneration) -> Path:
    """Write processor and model, the weights rounded to bf16."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(directory)
    # Loaders that do not know the combined processor file look for these two.
    processor.image_processor.save_pretrained(directory)
    processor.video_processor.save_pretrained(directory)
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight")  # tied to the embedding
    write_weights(directory / "model.safetensors", weights)
    config = model.config.to_dict()
    config["architectures"] = ["SmolVLMForConditionalGeneration"]
    config["dtype"] = "bfloat16"
    config["text_config"]["dtype"] = config["vision_config"]["dtype"] = "bfloat16"
    config["text_config"]["architectures"] = ["LlamaForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(directory)
    return directory


def load_weights(model: SmolVLMForConditionalGeneration, path: Path) -> None:
    """Load the weights of a stage or of a checkpoint into a model, in the model's precision."""
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{path} does not hold this model's weights: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
