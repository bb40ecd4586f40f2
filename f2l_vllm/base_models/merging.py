"""Fewer visual tokens for a video: tokens that stay the same from frame to frame become one token, their mean.

A token that resembles the token at the same place of the frame before is merged into that token's run; the run's mean
replaces its first token. The first frame stays whole. How many tokens a later frame keeps depends on the video's size
alone, so that a prompt's length, and the text before each of its frames, are known before the vision tower has run.
Which tokens a frame keeps depends on its content.

Sources, and what differs:
- FrameFusion (arXiv 2501.01986; github.com/thu-nics/FrameFusion) finds the same pairs by cosine similarity
  and merges runs into the mean at their first token. It does so in the first layers of the language model, above a
  threshold of similarity, and then prunes by attention to a budget of computation. Here tokens are merged once, before
  the language model: a server needs no attention weights, caches what it reads, and only the budget decides.
- EVS, vLLM's own `--video-pruning-rate` (vllm/multimodal/video_prune/evs.py, 0.32), keeps the same number of tokens,
  ranked over the whole video by the same similarity, and drops the rest. The number that a frame keeps then depends on
  its content, and models with text between frames (Nemotron) write that text as embeddings afterwards.

Shape suffixes: F frames, P tokens of a frame, D hidden size, N kept tokens, T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from f2l_vllm.base_models.rate import check_rate


def tokens_of_frames(num_frames: int, tokens_per_frame: int, rate: float) -> list[int]:
    """How many tokens each frame of a video keeps.

    The total is that of EVS: `int(all * (1 - rate))`, but at least the first frame's tokens; here also at least one
    token per later frame. The later frames share their tokens evenly, to within one token.

    Raises:
        ValueError: a rate outside [0, 1).
    """
    check_rate(rate)
    later = num_frames - 1
    shared = max(later, int(num_frames * tokens_per_frame * (1 - rate)) - tokens_per_frame)
    return [tokens_per_frame] + [shared * (i + 1) // later - shared * i // later for i in range(later)]


def without_merged(ids: Sequence[int], image_token_id: int, tokens_per_frame: int, counts: Sequence[int]) -> list[int]:
    """A prompt's ids [T] with only as many image tokens for each frame of its one video as the frame keeps.

    Args:
        ids: of the whole prompt: `tokens_per_frame` image tokens for each frame.
        counts: as `tokens_of_frames` returns them.

    Raises:
        ValueError: the prompt's image tokens belong to another number of frames.
    """
    seen, kept = 0, []
    for token in ids:
        if token == image_token_id:
            frame, place = divmod(seen, tokens_per_frame)
            seen += 1
            if frame < len(counts) and place >= counts[frame]:
                continue
        kept.append(token)
    if seen != len(counts) * tokens_per_frame:
        raise ValueError(f"the prompt has {seen} image tokens, not {len(counts)} frames of {tokens_per_frame}")
    return kept


def merge_tokens(batches: Iterable[Tensor], num_frames: int, rate: float) -> Tensor:
    """Merge a video's tokens, frame after frame; memory grows with the number of kept tokens.

    Args:
        batches: the frames' tokens in order, a few frames `[f, P, D]` at a time.
        num_frames: how many frames there are in all.
        rate: part of the tokens to save.

    Returns:
        `[N, D]`: the kept tokens of the first frame, of the second, and so on, each frame's in order of their places.
        They have the tokens' own type; similarities and means are computed in fp32.

    Raises:
        ValueError: the rate is outside [0, 1), or there is another number of frames.
    """
    frames = (frame_PD for batch in batches for frame_PD in batch)
    first_PD = next(frames)
    counts = tokens_of_frames(num_frames, len(first_PD), rate)
    last_PD = first_PD.float()
    slots_P = torch.arange(counts[0], device=first_PD.device)  # for each place, the kept token of the current run
    sums_ND = last_PD.new_zeros(sum(counts), first_PD.shape[-1])
    lengths_N = last_PD.new_zeros(sum(counts), 1)
    sums_ND[slots_P], lengths_N[slots_P] = last_PD, 1
    filled = counts[0]
    for frame_PD, count in zip(frames, counts[1:], strict=True):
        now_PD = frame_PD.float()
        by_similarity_P = cosine_similarity(now_PD, last_PD, dim=-1).argsort(stable=True)
        begins = by_similarity_P[:count].sort().values  # the places where the frame differs most from the one before
        slots_P[begins] = torch.arange(filled, filled + count, device=slots_P.device)
        sums_ND[slots_P] += now_PD
        lengths_N[slots_P] += 1
        filled, last_PD = filled + count, now_PD
    return (sums_ND / lengths_N).to(first_PD.dtype)
