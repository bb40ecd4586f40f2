"""The default model, made from nothing: a synthetic world, a tiny SmolVLM that sees it, and the hypernetwork on top."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "build_checkpoint": "f2l_vllm.recipes.f2l_tiny.checkpoint",
    "make_model": "f2l_vllm.recipes.f2l_tiny.recipe",
    "sample_scenes": "f2l_vllm.synthetic.world",
    "score_model": "f2l_vllm.recipes.f2l_tiny.score",
    "write_mp4": "f2l_vllm.synthetic.render",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'f2l_vllm.recipes.f2l_tiny' has no attribute {name!r}")
