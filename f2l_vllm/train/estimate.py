"""How much memory a training step needs, from shapes, before the first one is taken.

Shape suffixes as in `hypernetwork/perceiver.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from f2l_vllm.base_models.text_layers import text_model_of
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.hypernetwork.perceiver import EXPANSION

_QUERY_COPIES = 8  # per block: queries, and what they read, on their way through the weights


@dataclass(frozen=True)
class Part:
    """What a process computes at once.

    Attributes:
        videos: B.
        chunks: K of each.
        tokens: T of a chunk's message.
        text: S tokens of a row of questions and answers.
        answers: tokens of all rows' answers, which have logits.
        frames: of each video.
    """

    videos: int
    chunks: int
    tokens: int
    text: int
    answers: int
    frames: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a process.

    Attributes:
        model: the frozen model's weights.
        hypernetwork: its weights.
        gradients: of these.
        optimizer: its state.
        features: what the model computes for the hypernetwork to read.
        reading: kept for the backward pass of the Perceiver.
        writing: kept for that of the head and of the factors.
        answering: kept for that of the model under the adapter, with its logits.
    """

    model: int
    hypernetwork: int
    gradients: int
    optimizer: int
    features: int
    reading: int
    writing: int
    answering: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def activations(self) -> int:
        """What is kept for the backward pass."""
        return self.reading + self.writing + self.answering


def estimate(
    model: nn.Module,
    hyper: Hypernetwork,
    part: Part,
    *,
    bf16: bool,
    muon: bool,
    teacher: bool,
    recompute: bool = False,
) -> Memory:
    """The memory of a step of one process.

    P are the hypernetwork's parameters, N = B L its rows of T tokens, D the text model's width, d and Q width and
    queries of the Perceiver, Z = Q times heads, c the bytes of a number: 2 in bf16, 4 in fp32.

    - gradients 4 P, optimizer 8 P (Muon: 4, taken here for all)
    - features 2 N T D, in the model's type
    - reading, for each of K chunks: N T (17 D c + 12 d) + N blocks (8 T Z + 32 d Z + Q d (16 c + 40)). 16 D are the
      four vectors of 4 D that the gated projection keeps; 8 T Z are the scores and shares of all queries, in fp32.
      The decoder and the layers before the head, whose context is short, are counted alike. If it is computed
      again, each chunk keeps its features, 4 N T D, and only one text layer of one chunk is in memory
    - writing, with rank R, M modules and X entries in a row of A and B: 4 B L M R X (3 K + 2 (K + 1))
    - answering, with intermediate size I, vocabulary V and m bytes for a number of the model:
      B S L (m (6 D + 3 I) + 4 I), without the last if m is 4, and 12 V for each token of an answer, 28 V with a
      teacher. The frozen model's weights need no gradients, so its linears keep no inputs; the adapter's do

    Args:
        part: what the process computes at once.
        bf16: the computation runs in bf16, not in fp32.
        muon: Muon trains the matrices.
        teacher: the divergence from the model with the frames is part of the loss.
        recompute: the Perceiver is computed again, a text layer at a time.
    """
    config = hyper.config
    text: Any = text_model_of(model).config
    parameters = sum(parameter.numel() for parameter in hyper.parameters())
    held = next(iter(model.parameters())).element_size()
    c, size, layers = 2 if bf16 else 4, config.latent_size, config.num_layers
    rows = part.videos * layers
    tokens = rows * part.tokens
    queries = config.num_latents * config.num_heads
    outputs = len(config.modules) * config.rank
    projected = tokens * ((1 + 4 * EXPANSION) * config.feature_size * c + 12 * size)
    blocks = config.num_blocks * (1 + config.num_self_attn_per_block)
    per_row = config.num_blocks * 8 * part.tokens * queries
    per_row += blocks * (4 * _QUERY_COPIES * size * queries + config.num_latents * size * (16 * c + 40))
    last = outputs * config.num_heads  # the decoder, which reads the latents
    per_row += 4 * _QUERY_COPIES * size * last + 8 * last * (outputs + config.num_latents)
    per_row += outputs * size * (16 * c + 40) * (1 + config.num_pre_head_layers)
    written = 4 * part.videos * layers * outputs * config.head_size
    reading = part.chunks * (projected + rows * per_row)
    if recompute:
        reading = part.chunks * 4 * tokens * config.feature_size + (projected + rows * per_row) // layers
    m, inner = min(held, c), text.intermediate_size
    kept = m * (6 * config.feature_size + 3 * inner) + (0 if m == 4 else 4 * inner)
    return Memory(
        model=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        hypernetwork=4 * parameters,
        gradients=4 * parameters,
        optimizer=(4 if muon else 8) * parameters,
        features=2 * held * tokens * config.feature_size,
        reading=reading,
        writing=written * (3 * part.chunks + 2 * (part.chunks + 1)),
        answering=part.videos * part.text * layers * kept + part.answers * text.vocab_size * (28 if teacher else 12),
    )
