"""How fast a run goes, how long it still takes, and how much memory it has needed."""

from __future__ import annotations

import resource
import time

import torch

# Figures of a log line that differ from run to run; all others are the same however often a run was stopped.
MEASURED = ("cpu_seconds", "tokens_per_s", "eta_s", "peak_memory_mib", "waited_s")


class Pace:
    """Measures the steps from now on.

    Args:
        device: whose memory is looked at; for the CPU it is this process's.
        step: steps that are already done.
    """

    def __init__(self, device: torch.device, step: int) -> None:
        self._device, self._first = device, step
        self._begun = self._looked = time.monotonic()
        self._tokens = 0.0

    def add(self, tokens: float) -> None:
        """Count the tokens of a step."""
        self._tokens += tokens

    def figures(self, step: int, steps: int) -> dict[str, float]:
        """When `step` of `steps` are done: tokens a second since the last look (if they are counted), seconds to go at
        the mean pace so far, and the most memory so far in MiB."""
        now = time.monotonic()
        figures = {
            "eta_s": round((now - self._begun) / (step - self._first) * (steps - step), 1),
            "peak_memory_mib": round(peak_memory(self._device) / 2**20, 1),
        }
        if self._tokens:
            figures["tokens_per_s"] = round(self._tokens / max(now - self._looked, 1e-9), 1)
        self._looked, self._tokens = now, 0.0
        return figures


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors have taken on a GPU, or that this process has taken of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
