"""How good answers are: questions with known answers, asked in every arm, scored, compared and reported."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Setup": "f2l_vllm.evaluation.setup",
    "evaluate": "f2l_vllm.evaluation.run",
    "manifest_questions": "f2l_vllm.evaluation.sources",
    "world_questions": "f2l_vllm.evaluation.sources",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'f2l_vllm.evaluation' has no attribute {name!r}")
