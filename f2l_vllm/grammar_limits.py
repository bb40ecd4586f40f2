"""How much time and memory following a constraint may take, on trial and in the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GrammarLimits:
    """What trying one constraint may take.

    Attributes:
        seconds: CPU seconds; the trial may take twice as long in wall-clock time.
        memory_bytes: address space, in addition to what all trials share.
    """

    seconds: float = 5.0
    memory_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"GrammarLimits.{name} must be positive, got {value!r}.")


def matching_seconds(tokens: int) -> float:
    """How many seconds matching an answer's first `tokens` tokens against its constraint may take.

    A step of the engine waits for it, and every other question waits for the step. JSON takes 0.1 ms per token.
    """
    return 0.15 + 0.002 * tokens
