"""Files of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors. The library's own writer makes files that only the owner can read; this follows the umask."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)
