"""Checks that an adapter has an effect, and not an excessive one, before it answers for a video.

Shape suffixes: L text layers, R rank, T tokens of the probe, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from f2l_vllm.base_models.text_layers import target_linear, text_layers_of
from f2l_vllm.hypernetwork.adapter import Adapter, apply_adapter

PROBE = "What is shown in the video?"
# The default model's adapters have an effect of 0.3 to 0.5 and norms of 1.0 to 1.7. A zero adapter's effect is 0.
LEAST_EFFECT = 1e-3
LARGEST_NORM = 50.0


@dataclass(frozen=True)
class Finding:
    """What the check measured.

    Attributes:
        effect: change of the probe's logits relative to the logits without adapter, at the position of the largest
            change; both without their mean, on which no answer depends.
        norm: the largest ||s B A|| over layers and modules, relative to the wrapped weight's norm.
    """

    effect: float
    norm: float


class AdapterCheck:
    """Checks the adapters of one model; runs the model without adapter once.

    Args:
        model: the transformers model that adapters are made for, with or without its vision tower.
        tokenizer: of the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model = model
        ids: list[int] = tokenizer(PROBE)["input_ids"]
        self._ids_1T = torch.tensor([ids], device=next(model.parameters()).device)
        self._base_TV = self._logits()
        self._weights: dict[str, Tensor] = {}

    def check(self, adapter: Adapter) -> Finding:
        """Measure an adapter.

        Raises:
            ValueError: it is not finite, too large, or has no effect; the message says which and by how much.
        """
        norm = self._norm(adapter)
        if not norm <= LARGEST_NORM:
            raise ValueError(
                f"it changes a layer by {norm:.3g} times the layer's own weight (at most {LARGEST_NORM:g}), so answers "
                "would be noise"
            )
        with apply_adapter(self._model, adapter):
            changed_TV = self._logits()
        if not changed_TV.isfinite().all():
            raise ValueError("the model's output on a probe is not finite under it")
        effect = ((changed_TV - self._base_TV).norm(dim=-1) / self._base_TV.norm(dim=-1)).max().item()
        if not effect >= LEAST_EFFECT:
            raise ValueError(
                f"it changes the model's output on a probe by {effect:.3g} (at least {LEAST_EFFECT:g}), so answers "
                "would be those of the base model"
            )
        return Finding(effect, norm)

    @torch.no_grad()
    def _logits(self) -> Tensor:
        logits_TV: Tensor = self._model(input_ids=self._ids_1T, use_cache=False).logits[0].float()
        return logits_TV - logits_TV.mean(dim=-1, keepdim=True)

    @torch.no_grad()
    def _norm(self, adapter: Adapter) -> float:
        largest = 0.0
        for name, (a_LRI, b_LRO) in adapter.factors.items():
            a, b = a_LRI.float(), b_LRO.float()
            if not (a.isfinite().all() and b.isfinite().all()):
                raise ValueError(f"its factors of {name} are not finite")
            # ||B^T A||^2 is the sum of (A A^T) * (B B^T): matrices of the rank's size only.
            squared_L = ((a @ a.mT) * (b @ b.mT)).sum(dim=(1, 2)).clamp_min(0)
            largest = max(largest, (abs(adapter.scale) * squared_L.sqrt() / self._weight_norms(name)).max().item())
        return largest

    def _weight_norms(self, name: str) -> Tensor:
        """[L]: the norm of the wrapped weight in every layer."""
        if name not in self._weights:
            linears = [target_linear(self._model, layer, name) for layer in text_layers_of(self._model)]
            self._weights[name] = torch.stack([linear.weight.float().norm() for linear in linears])
        return self._weights[name]
