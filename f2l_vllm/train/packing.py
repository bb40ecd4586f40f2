"""Many questions about one video in one row: the video's tokens are computed once, the questions do not see each other.

A row is `[prefix][turn 1][turn 2] …`. Every turn attends to the prefix and to itself, and its positions go on from the
prefix, so its logits are those of the prompt made of the prefix and this turn alone. A text-only turn sees only the
part of the prefix that a text-only prompt has too: the `<|im_start|>User:` in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer. The answer's ids, with its end, are `ids[answer_start:]`."""

    ids: tuple[int, ...]
    answer_start: int
    kind: str
    with_video: bool


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B rows of S tokens. `labels[b, s]` is what position s should predict next, or `IGNORED`."""

    input_ids: Tensor  # [B, S]
    position_ids: Tensor  # [B, S]
    attention_mask: Tensor  # [B, 1, S, S] bool, true where a query (row) may look at a key (column)
    labels: Tensor  # [B, S]
    spans: list[list[tuple[int, int]]]  # per row and turn: the positions that predict its answer, [first, last + 1)


def pack(
    prefixes: Sequence[Sequence[int]], turns: Sequence[Sequence[Turn]], *, shared: int, pad_token_id: int
) -> PackedBatch:
    """Pack prefixes of equal length, one per row, with each row's turns.

    Args:
        shared: how many of the prefix's first tokens a text-only turn sees.

    Raises:
        ValueError: when the prefixes differ in length.
    """
    start = len(prefixes[0])
    if any(len(prefix) != start for prefix in prefixes):
        raise ValueError("the rows of a packed batch need prefixes of one length: batch clips of equal frame counts")
    rows = len(prefixes)
    length = start + max(sum(len(turn.ids) for turn in row) for row in turns)
    input_ids = torch.full((rows, length), pad_token_id)
    position_ids = torch.zeros(rows, length, dtype=torch.long)
    labels = torch.full((rows, length), IGNORED)
    segment = torch.full((rows, length), -1)  # 0 prefix, 1.. turns, -1 padding
    blind = torch.zeros(rows, length, dtype=torch.bool)
    input_ids[:, :start] = torch.tensor([list(prefix) for prefix in prefixes])
    position_ids[:, :start] = torch.arange(start)
    segment[:, :start] = 0
    spans: list[list[tuple[int, int]]] = []
    for row, row_turns in enumerate(turns):
        offset, row_spans = start, []
        for number, turn in enumerate(row_turns, start=1):
            end = offset + len(turn.ids)
            input_ids[row, offset:end] = torch.tensor(turn.ids)
            first = start if turn.with_video else shared
            position_ids[row, offset:end] = torch.arange(first, first + len(turn.ids))
            segment[row, offset:end] = number
            blind[row, offset:end] = not turn.with_video
            predicting = offset + turn.answer_start - 1
            labels[row, predicting : end - 1] = torch.tensor(turn.ids[turn.answer_start :])
            row_spans.append((predicting, end - 1))
            offset = end
        spans.append(row_spans)
    index = torch.arange(length)
    same = segment[:, :, None] == segment[:, None, :]
    prefix = (segment[:, None, :] == 0) & (~blind[:, :, None] | (index < shared))
    mask = (index[:, None] >= index) & (same | prefix)
    return PackedBatch(input_ids, position_ids, mask[:, None], labels, spans)


def answer_loss(hidden: Tensor, batch: PackedBatch, lm_head: nn.Module) -> Tensor:
    """Mean cross-entropy over the answers' tokens; an answer of n tokens has weight sqrt(n).

    With equal weight per token, captions drown out "Yes.". With equal weight per answer, the model learns too little
    from captions, where it first tells two shapes apart. Logits are computed only where there is a label.

    Args:
        hidden: the text model's output [B, S, D].
    """
    wanted = batch.labels != IGNORED
    losses = nn.functional.cross_entropy(lm_head(hidden[wanted]).float(), batch.labels[wanted], reduction="none")
    weights = torch.tensor([(b - a) ** -0.5 for spans in batch.spans for a, b in spans for _ in range(a, b)]).to(losses)
    return (losses * weights).sum() / weights.sum()


def exact_matches(hidden: Tensor, batch: PackedBatch, lm_head: nn.Module) -> list[list[bool]]:
    """Per row and turn, whether the greedy answer is the true one.

    Teacher forcing decides that exactly: the greedy answer is right if and only if every token of the true answer is
    the likeliest one after the true tokens before it.
    """
    wanted = batch.labels != IGNORED
    right = torch.ones_like(wanted)
    right[wanted] = lm_head(hidden[wanted]).argmax(-1) == batch.labels[wanted]
    return [[bool(right[row, a:b].all()) for a, b in spans] for row, spans in enumerate(batch.spans)]
