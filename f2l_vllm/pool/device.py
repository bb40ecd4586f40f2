"""The device of a worker, as its specification says, and its share of that device's memory."""

from __future__ import annotations

import torch

from f2l_vllm.hypernetwork.precision import use_tf32

_CONTEXT_BYTES = 1 << 29  # what CUDA keeps in a process beside torch's memory


def take_device(gpus: float) -> torch.device:
    """The device for a worker with so many GPUs, or this part of one; this process then keeps to its part.

    Ray reserves a part of a GPU by its books only, and hides no GPU from a process that has none of one.

    Raises:
        RuntimeError: the worker has a part of a GPU, and torch finds none.
    """
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"a worker has {gpus:g} of a GPU, and torch {torch.__version__} finds none: f2l-vllm doctor says why; with "
            "--worker-gpus 0 workers compute on the CPU"
        )
    device = torch.device("cuda", 0)
    use_tf32()
    if gpus < 1:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_fraction(gpus, total), device)
    return device


def memory_fraction(gpus: float, total_bytes: int) -> float:
    """The part of a GPU's memory that torch may take, so that the whole process stays within its part."""
    return max(0.0, gpus - _CONTEXT_BYTES / total_bytes)
