"""f2l-vllm: questions about a video at the cost of text.

A hypernetwork reads a video once, as a frozen vision-language model encodes it, and writes a LoRA adapter; from then
on the same model answers any question about that video from the adapter alone. Public names load on first use, so
that `import f2l_vllm` stays cheap in every process that only needs a part.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("f2l-vllm")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

_PUBLIC = {
    "Adapter": "f2l_vllm.hypernetwork.adapter",
    "Hypernetwork": "f2l_vllm.hypernetwork.model",
    "HypernetworkConfig": "f2l_vllm.hypernetwork.config",
    "Internalizer": "f2l_vllm.hypernetwork.internalizer",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'f2l_vllm' has no attribute {name!r}")
