"""Validation while a stage is trained: how the loss on held-out examples goes, and the weights where it was lowest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Validation:
    """Takes the validation loss before the first step, every few steps and after the last; keeps the best weights.

    Args:
        measure: returns the loss; every process calls it at the same steps, and all get the same number.
        every: steps between two validations.
        keep_best: keep the best weights, too; one process needs to.

    Attributes:
        losses: step (0 before the first) -> loss.
        best_step: where the loss was lowest, the earliest of equals; None while no loss is a number.
        best: the weights after that step, on the CPU, if they are kept.

    Raises:
        ValueError: `every` is not positive.
    """

    def __init__(self, measure: Callable[[], float], every: int, *, keep_best: bool = False) -> None:
        if every < 1:
            raise ValueError(f"Validation takes place every so many steps: give a positive number, got {every!r}.")
        self.losses: dict[int, float] = {}
        self.best_step: int | None = None
        self.best: dict[str, Tensor] | None = None
        self._measure, self._every, self._keep_best = measure, every, keep_best

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the loss is taken when `step` of `steps` steps are done."""
        return step % self._every == 0 or step == steps

    @torch.no_grad()
    def take(self, step: int, module: nn.Module) -> float:
        """The loss when `step` steps are done; `module`, which is trained, is in evaluation mode meanwhile."""
        mode = module.training
        module.eval()
        loss = self._measure()
        module.train(mode)
        if not math.isnan(loss) and (self.best_step is None or loss < self.losses[self.best_step]):
            self.best_step = step
            if self._keep_best:
                self.best = {name: tensor.to("cpu", copy=True) for name, tensor in module.state_dict().items()}
        self.losses[step] = loss
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, for `load_state_dict`."""
        return {"losses": dict(self.losses), "best_step": self.best_step, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the validations of a stopped run."""
        self.losses, self.best_step = dict(state["losses"]), state["best_step"]
        self.best = state["best"] if self._keep_best else None
