"""Let a CPU-only torch live next to CUDA builds of torchvision, torchaudio and torchcodec.

PyPI's builds of those packages link against CUDA's torch, so next to a CPU torch their compiled libraries do not
load. torchvision then fails in `register_fake("torchvision::nms")`; declaring the two schemas it names is enough,
because SmolVLM calls none of the compiled operators. torchaudio and torchcodec raise `OSError` where transformers
and vLLM expect `ImportError`; hidden, they read as "not installed". Where the libraries load, nothing is changed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_HIDDEN_IF_BROKEN = {"torchaudio": "lib/_torchaudio*.so", "torchcodec": "libtorchcodec_image*.so"}
_keep_alive: list[object] = []  # a torch Library drops its definitions when it is collected


def install() -> None:
    """Make `import torchvision` work, and broken torchaudio / torchcodec read as absent. Idempotent."""
    if not _keep_alive and _is_broken("torchvision", "_C*.so"):
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _keep_alive.append(library)
    for package, pattern in _HIDDEN_IF_BROKEN.items():
        if _is_broken(package, pattern):
            sys.modules[package] = None  # type: ignore[assignment]  # import raises ImportError


def _is_broken(package: str, pattern: str) -> bool:
    """True when the package is installed, not imported yet, and its compiled library does not load."""
    if package in sys.modules:
        return False
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return False
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
    if not libraries:
        return False
    import torch

    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:
        return True
    return False
