"""Muon for the matrices, AdamW for everything else, behind one schedule.

Muon is `torch.optim.Muon`, which takes 2-D parameters. Stacked weights [L, in, out] are given to it as L matrices
that share the parameter's memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_NOT_MATRICES = ("embed", "lm_head", "patch_embedding", "scaler", "bias", "latents")


class MuonAdamW:
    """One optimizer over named parameters.

    Args:
        muon_lr, adamw_lr: learning rates before the schedule's factor. Without a `muon_lr` AdamW takes everything.
        slow: (prefix, factor on the learning rates of the parameters whose name has this prefix).
        weight_decay: of the matrices; the rest has none.
        clip: limit of the gradient's norm, over all parameters.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        muon_lr: float | None,
        adamw_lr: float,
        weight_decay: float = 0.01,
        clip: float = 1.0,
        slow: tuple[str, float] | None = None,
    ) -> None:
        self.parameters: list[nn.Parameter] = []
        self._slices: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
        matrices: dict[float, list[nn.Parameter]] = {}
        others: dict[float, list[nn.Parameter]] = {}
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            self.parameters.append(parameter)
            pace = slow[1] if slow and name.startswith(slow[0]) else 1.0
            if any(word in name for word in _NOT_MATRICES) or parameter.ndim not in (2, 3):
                others.setdefault(pace, []).append(parameter)
            elif parameter.ndim == 2:
                matrices.setdefault(pace, []).append(parameter)
            else:
                views = [nn.Parameter(view) for view in parameter.data]
                self._slices.append((parameter, views))
                matrices.setdefault(pace, []).extend(views)
        self.clip = clip
        self._optimizers: list[torch.optim.Optimizer] = []
        self._rates: list[float] = []
        decayed, free = _groups(matrices, weight_decay), _groups(others, 0.0)
        if muon_lr is None:
            self._optimizers.append(torch.optim.AdamW([*decayed, *free], lr=adamw_lr))
            self._rates.append(adamw_lr)
            return
        self._optimizers.append(torch.optim.Muon(decayed, lr=muon_lr))
        self._optimizers.append(torch.optim.AdamW(free, lr=adamw_lr, betas=(0.9, 0.98)))
        self._rates += [muon_lr, adamw_lr]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, factor: float) -> float:
        """Clip, update with the learning rates times `factor`; returns the gradient's norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for parameter, views in self._slices:
            for index, view in enumerate(views):
                view.grad = None if parameter.grad is None else parameter.grad[index]
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor * group["pace"]
            optimizer.step()
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, for `load_state_dict`."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the optimizer of `state` was; the module restores the parameters themselves."""
        for optimizer, kept in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)


def _groups(parameters: dict[float, list[nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": some, "weight_decay": weight_decay, "pace": pace} for pace, some in parameters.items()]


def warm_constant_linear(step: int, steps: int, *, warmup: int = 60, decay_from: float = 0.5) -> float:
    """The schedule's factor: linear warm-up (at most a fifth of the steps), constant, then linear to 2 % from
    `decay_from` of the steps on."""
    warmup = max(1, min(warmup, steps // 5))
    done = step / max(1, steps)
    decay = 1.0 if done < decay_from else max(0.02, 1 - (done - decay_from) / (1 - decay_from))
    return min(1.0, (step + 1) / warmup) * decay


def warm_cosine(step: int, steps: int) -> float:
    """The schedule's factor: linear warm-up over 3 % of the steps, then half a cosine down to zero.

    Source: Frames2LoRA (arXiv 2606.04351), training appendix.
    """
    warmup = max(1, round(steps * 0.03))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
