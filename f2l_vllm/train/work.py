"""How many floating-point operations a training step takes, from shapes: those of its matrix products.

Shape suffixes as in `hypernetwork/perceiver.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from f2l_vllm.base_models.text_layers import text_layers_of, text_model_of
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.perceiver import EXPANSION
from f2l_vllm.train.estimate import Part


@dataclass(frozen=True)
class Work:
    """Floating-point operations of what a process computes at once; a multiply-add is two.

    Attributes:
        seeing: the vision tower, without gradients; twice with a teacher.
        reading: the text layers, for the features that the hypernetwork reads, without gradients.
        perceiving: the Perceiver and the head, with their backward pass.
        answering: the model under the adapter, with its backward pass, which leaves its weights alone.
        teaching: the model with the frames in its context, without gradients.
    """

    seeing: int
    reading: int
    perceiving: int
    answering: int
    teaching: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))


def work_of(
    model: nn.Module, config: HypernetworkConfig, part: Part, *, teacher: bool, recompute: bool = False
) -> Work:
    """The operations of a part, without the optimizer and without what works on one element at a time.

    With B videos of K chunks of T tokens, L text layers of W weights and hidden size D, S tokens of text, N answers'
    tokens, vocabulary V, and attention over all heads of size A:

    - a text layer takes 2 W + 4 A n for each of n tokens. The features need L - 1 of them, B K times
    - answering takes L of them forward, and about as many back to all layers but the first, where the attention is
      computed again; the adapter's rank (K + 1) R adds its factors three times; the logits 4 N D V
    - the Perceiver is computed once forward and twice back, except for its first product, whose input needs no
      gradient; once more if it is computed again

    Args:
        part: what the process computes at once.
        teacher: the divergence from the model with the frames is part of the loss.
        recompute: the Perceiver is computed again in the backward pass.
    """
    rows, chunks = part.videos, part.chunks
    text: Any = text_model_of(model).config
    layer = text_layers_of(model)[0]
    weights = sum(linear.weight.numel() for linear in layer.modules() if isinstance(linear, nn.Linear))
    layers, size = config.num_layers, config.feature_size
    attention = text.num_attention_heads * (getattr(text, "head_dim", None) or size // text.num_attention_heads)

    def of_layers(tokens: int) -> int:
        return tokens * (2 * weights + 4 * attention * tokens)

    logits = 2 * part.answers * size * text.vocab_size
    adapter = 2 * part.text * (chunks + 1) * config.rank * sum(map(sum, config.modules.values()))
    forward = layers * of_layers(part.text)
    back = (layers - 1) * (of_layers(part.text) + 6 * attention * part.text**2)
    perceived, first = _perceiver(config, part.tokens)
    times = 4 if recompute else 3
    return Work(
        seeing=rows * part.frames * _frame(model, size) * (2 if teacher else 1),
        reading=rows * chunks * (layers - 1) * of_layers(part.tokens),
        perceiving=rows * chunks * layers * (times * perceived - first),
        answering=rows * (forward + back + 3 * layers * adapter) + 2 * logits,
        teaching=rows * layers * of_layers(chunks * part.tokens + part.text) + logits if teacher else 0,
    )


def _frame(model: nn.Module, size: int) -> int:
    """Of the vision tower and the connector, for one frame."""
    config: Any = model.config
    vision = config.vision_config
    patches, width = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    layer = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * patches**2 * width
    ends = 2 * patches * width * (vision.num_channels * vision.patch_size**2 + size)
    return vision.num_hidden_layers * layer + int(ends)


def _perceiver(config: HypernetworkConfig, tokens: int) -> tuple[int, int]:
    """Of the forward pass over one text layer of one chunk: of all, and of the first product alone."""
    size, heads = config.latent_size, config.num_heads * config.head_dim
    outputs = len(config.modules) * config.rank
    hidden = EXPANSION * config.feature_size

    def layer(queries: int, context: int) -> int:
        attended = 4 * config.num_heads * queries * size * (queries + context)
        return 8 * queries * heads * size + attended + 6 * queries * EXPANSION * size**2

    first = 4 * tokens * config.feature_size * hidden
    projected = first + 2 * tokens * hidden * size
    alone = config.num_blocks * config.num_self_attn_per_block * layer(config.num_latents, 0)
    read = config.num_blocks * layer(config.num_latents, tokens) + alone + layer(outputs, config.num_latents)
    heads_of_rows = config.num_pre_head_layers * 4 * outputs * EXPANSION * size**2
    return projected + read + heads_of_rows + 2 * outputs * size * config.head_size, first
