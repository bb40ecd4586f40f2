"""What a check found: what was compared, how far the two are apart, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        name: what was checked.
        compared: with what, and how many.
        difference, allowed: in `unit`; None: there was nothing to measure it on.
        trouble: what is wrong, as a sentence; None: the two agree.
    """

    name: str
    compared: str = ""
    difference: float | None = None
    allowed: float | None = None
    unit: str = ""
    trouble: str | None = None

    @property
    def line(self) -> str:
        """For the terminal and the page."""
        if self.difference is None:
            return f"{self.name}: FAILED: {self.trouble}"
        verdict = "agrees" if self.trouble is None else "DISAGREES"
        apart = f"largest difference {self.difference:.2g} {self.unit}, allowed {self.allowed:.2g}"
        return f"{self.name}: {verdict} with {self.compared}; {apart}" + (f": {self.trouble}" if self.trouble else "")
