"""Other block sizes for the CPU, so that small inputs are read in several blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from f2l_vllm.hypernetwork.blocks import CPU


def limit_cpu(monkeypatch: pytest.MonkeyPatch, **numbers: int) -> None:
    """Set some of the CPU's `BlockSizes`."""
    monkeypatch.setattr("f2l_vllm.hypernetwork.blocks.CPU", replace(CPU, **numbers))
