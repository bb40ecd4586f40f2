"""Visual tokens dropped while a question is answered, by what they are alone: no attention weight is looked at.

Two ways, from which `f2l-vllm eval` answers as arms of their own:
- EVS, before the text layers. Every token is compared (cosine) with the token at the same place of the frame before;
  the most similar ones of the whole video are dropped, the first frame stays whole. The same tokens are kept as by vLLM
  0.32 for the models that it prunes so (vllm/multimodal/video_prune/evs.py).
- V2Drop, between text layers (arXiv 2509.01552; github.com/xuyang-liu16/V2Drop). At a few layers those tokens are
  dropped that changed least, by L2 norm, between the input of the layer before and the layer's own. Its code does so
  at layers 3, 17 and 22 of 32, with shares set for one model. Here the layers have the same relative depths, and each
  keeps the same share, so that the keep rate is what is left in the end.

What a token that is dropped leaves behind differs: without EVS's tokens the prompt is shorter and its positions follow
each other; V2Drop's tokens keep their positions, and the layers before keep their keys and values.

Shape suffixes: F frames, P tokens of a frame, D hidden size, V visual tokens, T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from f2l_vllm.base_models.rate import check_keep_rate
from f2l_vllm.base_models.text_layers import text_layers_of

_DEPTHS = (3 / 32, 17 / 32, 22 / 32)  # of V2Drop's layers


def evs_mask(tokens_FPD: Tensor, keep: float) -> Tensor:
    """Which tokens EVS keeps, [F * P] bool: `int(keep * all)` of them, but at least those of the first frame.

    Raises:
        ValueError: a keep rate outside (0, 1].
    """
    frames, places = tokens_FPD.shape[:2]
    count = max(places, int(frames * places * check_keep_rate(keep)))
    change_FP = 1 - cosine_similarity(tokens_FPD[1:], tokens_FPD[:-1], dim=-1)
    first_P = torch.full_like(tokens_FPD[:1, :, 0], 255)  # above any change
    order = torch.cat([first_P, change_FP]).flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(frames * places, dtype=torch.bool, device=tokens_FPD.device)
    mask[order[:count]] = True
    return mask


def most_varied(before_VD: Tensor, now_VD: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the `count` tokens that changed most; of equal ones the earlier."""
    change_V = (now_VD.float() - before_VD.float()).norm(dim=-1)
    return change_V.argsort(descending=True, stable=True)[:count].sort().values


def stages(num_layers: int, visual: int, keep: float) -> dict[int, int]:
    """Layer -> how many of `visual` tokens it and the layers after it read; layers before the first read all.

    Raises:
        ValueError: a keep rate outside (0, 1].
    """
    check_keep_rate(keep)
    layers = list(dict.fromkeys(max(1, round(depth * num_layers)) for depth in _DEPTHS))
    layers = [layer for layer in layers if layer < num_layers]
    return {layer: max(1, round(visual * keep ** ((at + 1) / len(layers)))) for at, layer in enumerate(layers)}


def mean_tokens(num_layers: int, visual: int, keep: float) -> float:
    """How many visual tokens a text layer reads, in the mean over layers."""
    at, read, total = stages(num_layers, visual, keep), visual, 0
    for layer in range(num_layers):
        read = at.get(layer, read)
        total += read
    return total / num_layers


@contextmanager
def variation_dropping(model: nn.Module, visual_T: Tensor, keep: float) -> Iterator[None]:
    """Within the block, a prompt's visual tokens are dropped between text layers.

    Args:
        model: answers one prompt at a time, not padded, with a key-value cache.
        visual_T: where the prompt has visual tokens, bool.
        keep: part of them that the last layers read.

    Raises:
        ValueError: a keep rate outside (0, 1].
    """
    layers = text_layers_of(model)
    run = _Run(visual_T, stages(len(layers), int(visual_T.sum()), keep))
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(run.hook(index), with_kwargs=True).remove)
        yield


class _Run:
    """One prompt's way through the layers, and the answer's tokens after it."""

    def __init__(self, visual_T: Tensor, at: dict[int, int]) -> None:
        self._visual_T, self._at = visual_T, at
        self._length = len(visual_T)
        self._kept: dict[int, Tensor] = {}  # layer -> places of the prompt that it reads
        self._before_TD = visual_T.new_zeros(0)

    def hook(self, index: int) -> Any:
        """For one layer."""

        def enter(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden_BTD = args[0] if args else kwargs.pop("hidden_states")
            if hidden_BTD.shape[0] != 1:
                raise ValueError(f"tokens are dropped from one prompt at a time, not from {hidden_BTD.shape[0]}")
            if hidden_BTD.shape[1] > 1:  # the prompt; an answer's tokens come one by one
                hidden_BTD = self._drop(index, hidden_BTD)
                return (hidden_BTD,), self._read(index, kwargs)
            return (hidden_BTD,), {**kwargs, "attention_mask": None}  # it sees all keys that the layer has

        return enter

    def _drop(self, index: int, hidden_BTD: Tensor) -> Tensor:
        if index == 0:
            self._kept[0] = torch.arange(self._length, device=hidden_BTD.device)
        else:
            kept = self._kept[index - 1]
            if index in self._at:
                visual = self._visual_T.to(kept.device)[kept]
                places = visual.nonzero().squeeze(1)
                chosen = most_varied(self._before_TD[places], hidden_BTD[0, places], self._at[index])
                stays = ~visual
                stays[places[chosen]] = True
                kept, hidden_BTD = kept[stays], hidden_BTD[:, stays]
            self._kept[index] = kept
        self._before_TD = hidden_BTD[0]
        return hidden_BTD

    def _read(self, index: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The layer's other arguments for the tokens that it reads: their places stay what they were."""
        kept = self._kept[index]
        changed = dict(kwargs)
        cos_sin, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        if cos_sin is not None:
            changed["position_embeddings"] = tuple(one[:, kept] for one in cos_sin)
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = kwargs["position_ids"][:, kept]
        if mask is not None:
            changed["attention_mask"] = mask[:, :, kept][..., kept]
        return changed
