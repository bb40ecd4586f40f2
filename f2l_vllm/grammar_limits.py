"""What following a constraint may cost, on trial and in the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GrammarLimits:
    """What trying one constraint may take.

    Attributes:
        seconds: CPU seconds; by the clock it may take twice as long.
        memory_bytes: address space, beside what is there for all trials.
    """

    seconds: float = 5.0
    memory_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"GrammarLimits.{name} must be positive, got {value!r}.")


def matching_seconds(tokens: int) -> float:
    """How long matching an answer's first tokens against its constraint may have taken, seconds.

    A step of the engine waits for it, and with the step every other question. JSON takes 0.1 ms a token.
    """
    return 0.15 + 0.002 * tokens
