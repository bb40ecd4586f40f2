"""Files of weights, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors. The library's own writer makes files that only the owner can read; this follows the umask."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def digest(tensors: Mapping[str, Tensor], head: bytes = b"") -> str:
    """16 hex digits that change with `head` and with any weight, but not with the device."""
    found = hashlib.sha256(head)
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return found.hexdigest()[:16]
